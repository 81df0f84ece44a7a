# SPDX-License-Identifier: Apache-2.0
"""Speech encoders of NeMo and Hugging Face, long audio in windows, and the cache of frames."""
