# SPDX-License-Identifier: Apache-2.0
"""Processes: groups, strategy, readers, gradients, checkpoints."""
