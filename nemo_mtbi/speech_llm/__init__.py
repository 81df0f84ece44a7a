# SPDX-License-Identifier: Apache-2.0
"""Speech encoder, connector and text LLM joined, and the losses."""
