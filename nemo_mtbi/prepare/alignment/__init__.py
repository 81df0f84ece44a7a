# SPDX-License-Identifier: Apache-2.0
"""When each word of a transcript is spoken: CTC forced alignment, refined by a model of the sounds."""
