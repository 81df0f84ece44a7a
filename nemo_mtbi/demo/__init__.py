# SPDX-License-Identifier: Apache-2.0
"""The embedded default: its data recipe, corpora and small models."""
