# SPDX-License-Identifier: Apache-2.0
"""The text LLM: Megatron-core GPT, its weights, adapters and training."""
