# SPDX-License-Identifier: Apache-2.0
"""Tasks, and the behavior targets that the text LLM gives to them."""
