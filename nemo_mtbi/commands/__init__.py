# SPDX-License-Identifier: Apache-2.0
"""What each command does: training, targets, transcription, evaluation; command line and progress."""
