# SPDX-License-Identifier: Apache-2.0
"""Scores of answers and their statistics: pure functions."""
