# SPDX-License-Identifier: Apache-2.0
"""Settings for every test. Nothing heavy is imported here: a test of a pure function must start at once."""

import inspect
import os
import subprocess
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that none of them is begun when the other workers have nothing left."""
    slow: dict[Path, int] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])


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

_WORKER = """\
import importlib.util, sys
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
getattr(module, sys.argv[2])(*sys.argv[3:])
"""


@pytest.fixture(scope="session")
def _pool(tmp_path_factory):
    from workers import WorkerPool

    pool = WorkerPool(tmp_path_factory.mktemp("workers"))
    yield pool
    pool.stop()


@pytest.fixture
def processes(_pool):
    """``processes(function, *arguments, count=2, timeout=180)`` runs a function of a test file in processes on gloo.

    The function stands at the top of its file and takes strings. The processes live as long as the session, so that
    NeMo is imported once in each; process groups are ended after each job. The test fails with what the processes
    report if one of them fails or the time is over.
    """

    def run(function, *arguments, count=2, timeout=180):
        _pool.run(inspect.getfile(function), function.__name__, [str(a) for a in arguments], count, timeout)

    return run


@pytest.fixture
def torchrun(tmp_path):
    """``torchrun(function, *arguments, processes=2, timeout=180)`` runs a function of a test file in processes.

    The function stands at the top of its file and takes strings; gloo is all it has. The test fails with what the
    processes printed if one of them fails, and none outlives the time limit.
    """

    def launch(function, *arguments, processes=2, timeout=180):
        script = tmp_path / "worker.py"
        script.write_text(_WORKER)
        root = Path(__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={processes}", str(script), inspect.getfile(function), function.__name__]
        command += [str(argument) for argument in arguments]
        with open(tmp_path / "worker.log", "w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = f"no end after {timeout} s"
            finally:
                process.terminate()  # torchrun then ends its workers, at the latest after 30 s
                process.wait()
            log.seek(0)
            assert status == 0, f"{status}\n{log.read()[-8000:]}"

    return launch
