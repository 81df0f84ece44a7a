# SPDX-License-Identifier: Apache-2.0
"""From cuts to training steps: checks, rows, dataset, loader."""
