# SPDX-License-Identifier: Apache-2.0
"""Files of results: written in one step, the same bytes for the same figures."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_mtbi.io.atomic import replacing


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a file in one step: a reader, or a run after a kill, finds it whole or not at all.

    Args:
        path: The file; its folder is made if it is missing.
        text: Its content, written as UTF-8.
    """
    path = Path(path)
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
    return path


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> Path:
    """Write JSON in one step: sorted keys, numbers rounded to 6 digits.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    try:
        text = json.dumps(rounded(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"the results for {path} hold NaN or infinity: leave that figure out or pass None") from error
    return write_text(path, text + "\n")


def rounded(value: Any) -> Any:
    """Return a JSON value with its numbers rounded to 6 digits."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value
