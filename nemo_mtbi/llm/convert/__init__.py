# SPDX-License-Identifier: Apache-2.0
"""LLMs of other frameworks."""
