# SPDX-License-Identifier: Apache-2.0
"""The ModelPT that NeMo trains, and what belongs to it."""
