# SPDX-License-Identifier: Apache-2.0
"""The ``.nemo`` of a speech LLM: writing, reading, guarding, warm start."""
