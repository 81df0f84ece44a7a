# SPDX-License-Identifier: Apache-2.0
"""Facts of a ``.nemo`` and of the parts that it refers to, compared with those of its training, without a model."""

from __future__ import annotations

from pathlib import Path

from nemo_mtbi.archive.frozen import FrozenParts
from nemo_mtbi.archive.restored import OpenArchive, restore_error
from nemo_mtbi.archive.save_restore import read_config
from nemo_mtbi.config.model import parse_model_config
from nemo_mtbi.evaluation.load import NemoFacts
from nemo_mtbi.io.nemo_tar import NemoFile
from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.register import register


def inspect_nemo(path: str | Path) -> NemoFacts:
    """Return where the parts of a model are, and whether its LLM was itself trained.

    Raises:
        ValueError: if the file is not an MTBI ``.nemo``, or a frozen part is missing or another one.
    """
    register()
    path = Path(path).expanduser()
    try:
        if not path.exists():
            raise ArchiveError("it does not exist")
        with NemoFile(path) as file:
            stored = read_config(file, MTBIModel)
            config = parse_model_config(stored)
            frozen = FrozenParts(config, OpenArchive(file, stored))
    except ArchiveError as error:
        raise ValueError(restore_error(path, error)) from error
    trained = config.llm_was_trained or bool(config.llm and config.llm.trains)
    return NemoFacts(frozen.path("asr"), trained)
