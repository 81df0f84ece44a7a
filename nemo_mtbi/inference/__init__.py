# SPDX-License-Identifier: Apache-2.0
"""Answers of a model: decoding, conversations, audio of users."""
