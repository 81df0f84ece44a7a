# SPDX-License-Identifier: Apache-2.0
"""Files: text, tensors, archives, locks, digests, and what may be read."""
