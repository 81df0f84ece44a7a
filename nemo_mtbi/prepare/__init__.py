# SPDX-License-Identifier: Apache-2.0
"""Corpora before training: recipes, exports, word times."""
