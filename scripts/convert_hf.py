# SPDX-License-Identifier: Apache-2.0
"""Converts LLMs between Hugging Face and Megatron: ``mtbi convert`` (:mod:`nemo_mtbi.commands.convert`)."""

import sys

from nemo_mtbi.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
