# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: sharded, written in the background, read at any parallel layout."""
