# SPDX-License-Identifier: Apache-2.0
"""Settings for every test. Nothing heavy is imported here: a test of a pure function must start at once."""

import ast
import functools
import inspect
import os
import sys
from pathlib import Path

# Before torch is imported. The models of the tests are tiny, and more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests neither download nor report to anyone.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))  # workers.py, checkpoint_run.py

from nemo_mtbi.commands.cli import quiet  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet_loggers() -> None:
    """NeMo and Lightning reset the level of their loggers when a test imports them."""
    quiet()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long matrices too (marker `full`)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long matrices, and begin with what takes long.

    Files that start processes come first, since one worker has all of them; then those with most slow tests, so that
    none of them is begun when the other workers have nothing left.
    """
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.stash[_LEFT_OUT] = len(left_out)
    slow: dict[Path, int] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: (not starts_processes(item.path), -slow[item.path]))


_LEFT_OUT = pytest.StashKey[int]()


@functools.cache
def starts_processes(path: Path) -> bool:
    """Return whether the source of a test file takes a pool of processes or has the marker ``processes``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.arg) and node.arg in ("processes", "_pool"):
            return True
        if isinstance(node, ast.Attribute) and node.attr == "processes" and ast.unparse(node.value) == "pytest.mark":
            return True
    return False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With ``--dist=loadfile``: all files that start processes are one unit, each other file is one.

    Two jobs of four processes each would compete for the CPUs; one beside the tests of a single process does not.
    """
    if config.getvalue("dist") != "loadfile":
        return None  # the usual one
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "processes" if starts_processes(config.rootpath / file) else file

    return Files(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Keep what a worker of pytest-xdist has left out: all of them collect the same."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much was left out."""
    if number := terminalreporter.config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{number} tests of the long matrices left out: scripts/test.sh --full")


# ------------------------------------------------------------------------------------------------ shared tiny models
# Read only: a test that changes a model makes its own with nemo_mtbi.testing (0.2 s; NeMo's import is what costs).


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory):
    """The directory of the tiny text LLM."""
    from nemo_mtbi.testing import tiny_text_llm

    return tiny_text_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def asr_model(tmp_path_factory):
    """The tiny NeMo ASR model."""
    from nemo_mtbi.testing import tiny_asr_model

    return tiny_asr_model(tmp_path_factory.mktemp("asr"))


@pytest.fixture(scope="session")
def speech_llm():
    """The tiny speech LLM in float64, with a head of its own, so that its answers vary."""
    import torch

    from nemo_mtbi.testing import tiny_speech_llm

    return tiny_speech_llm(dtype=torch.float64, tie_embeddings=False)


@pytest.fixture(scope="session")
def model_section(tmp_path_factory):
    """``model_section(**changes)``: the ``model:`` section of a tiny model with eight utterances to train on."""
    from omegaconf import OmegaConf

    from nemo_mtbi.testing import tiny_asr_nemo, tiny_cuts, tiny_text_llm

    folder = tmp_path_factory.mktemp("model")
    llm = tiny_text_llm(folder / "llm", tie_embeddings=False)
    cuts = str(tiny_cuts(folder / "cuts", 8, llm=llm))
    section = {
        "pretrained_asr": str(tiny_asr_nemo(folder / "asr.nemo")),
        "pretrained_llm": str(llm),
        "connector": {"hidden_size": 24},
        "generation": {"max_new_tokens": 8},
        "transcription_task": "repeat",
        "train_ds": {"cuts_path": cuts, "batch_size": 4, "shuffle": False, "rows_per_cut": 2},
        "validation_ds": {"cuts_path": cuts, "batch_size": 8},
        "optim": {"name": "adamw", "lr": 1e-2},
    }
    return lambda **changes: OmegaConf.merge(section, changes)


# ------------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="session")
def _pool(tmp_path_factory):
    from workers import WorkerPool

    pool = WorkerPool(tmp_path_factory.mktemp("workers"))
    yield pool
    pool.stop()


@pytest.fixture
def processes(_pool):
    """``processes(function, *arguments, count=2, timeout=180)`` runs a function of a test file in processes on gloo.

    The function stands at the top of its file and takes strings. The processes live as long as the session, unless
    ``fresh=True`` wants new ones, and are forked from one that has imported NeMo; process groups are ended after each
    job. The test fails with what the processes report if one of them fails or the time is over.
    """

    def run(function, *arguments, count=2, timeout=180, fresh=False):
        arguments = [str(argument) for argument in arguments]
        _pool.run(inspect.getfile(function), function.__name__, arguments, count, timeout, fresh)

    return run
