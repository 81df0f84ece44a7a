# SPDX-License-Identifier: Apache-2.0
"""Settings for every test. Nothing heavy is imported here: a test of a pure function must start at once."""

import os

# Before torch is imported. The models of the tests are tiny, and more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests neither download nor report to anyone.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import pytest  # noqa: E402

from nemo_mtbi.cli import quiet  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet_loggers() -> None:
    """NeMo and Lightning reset the level of their loggers when a test imports them."""
    quiet()
