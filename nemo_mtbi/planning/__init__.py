# SPDX-License-Identifier: Apache-2.0
"""What a run would take, found out before it starts: memory, buckets, the report of a plan."""
