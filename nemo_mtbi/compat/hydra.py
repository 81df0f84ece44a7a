# SPDX-License-Identifier: Apache-2.0
"""Hydra's internals."""

from __future__ import annotations

import argparse


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of Hydra's own command line.

    Uses ``hydra._internal.utils.get_args_parser``, which NeMo's ``hydra_runner`` uses too. Hydra has no public way to
    read a command line without running it, and the answer to ``--help`` must not wait for NeMo. A public parser, or
    the flags parsed here, would replace it.
    """
    from hydra._internal.utils import get_args_parser

    return get_args_parser()
