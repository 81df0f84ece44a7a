# SPDX-License-Identifier: Apache-2.0
"""Plans of runs before they start: memory, buckets, and the report."""
