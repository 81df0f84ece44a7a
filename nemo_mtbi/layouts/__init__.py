# SPDX-License-Identifier: Apache-2.0
"""Sequences as integer layouts: pure functions."""
