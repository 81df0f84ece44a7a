# SPDX-License-Identifier: Apache-2.0
"""Systems x sets x tasks: answers, tables, report."""
