# SPDX-License-Identifier: Apache-2.0
"""Chat formats, templates and tokenizers."""
