# SPDX-License-Identifier: Apache-2.0
"""Files: reading text as people have it, outputs that spare their inputs, locks."""
