# SPDX-License-Identifier: Apache-2.0
"""Typed sections of the configuration, and their checks."""
