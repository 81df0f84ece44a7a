#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Finds when each word of a corpus is spoken: the command ``mtbi align`` (:mod:`nemo_mtbi.commands.align`)."""

import sys

from nemo_mtbi.commands.align import main

if __name__ == "__main__":
    sys.exit(main())
