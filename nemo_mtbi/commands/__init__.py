# SPDX-License-Identifier: Apache-2.0
"""The commands: training, targets, transcription, evaluation, alignment, conversion; command line and progress."""
