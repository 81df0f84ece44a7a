# SPDX-License-Identifier: Apache-2.0
"""The commands that a YAML configures: ``examples/`` and ``mtbi`` run the same functions.

Nothing heavy is imported before a command runs, so that ``--help`` is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig


@dataclass(frozen=True)
class HydraCommand:
    """A command with a configuration.

    Attributes:
        config_name: the YAML that it reads by default, without ``.yaml``.
        run: what it does with the composed configuration; the docstring is its help.
        schema: returns the types of the configuration by key, see :func:`nemo_mtbi.commands.cli.hydra_main`.
        overrides: added behind those of the user.
    """

    config_name: str
    run: Callable[[DictConfig], Any]
    schema: Callable[[], Any]
    overrides: tuple[str, ...] = ()


def config_folder() -> Path:
    """Return the folder of the YAML files: ``nemo_mtbi/conf`` of an installed wheel, else ``conf/`` of the repository.

    Raises:
        RuntimeError: if neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "mtbi_demo.yaml").is_file():
            return folder
    raise RuntimeError(f"{package} was installed without its configurations: install the wheel of nemo_mtbi again")


# ------------------------------------------------------------------------------------------------------------ training


def train_schema() -> dict[str, Any]:
    """Return the types of the configuration of a training run."""
    from nemo.utils.exp_manager import ExpManagerConfig

    from nemo_mtbi.commands.train import BenchmarkConfig, DataConfig, ModelConfig

    sections = {
        "data": DataConfig,
        "model": ModelConfig,
        "benchmark": BenchmarkConfig,
        "exp_manager": ExpManagerConfig,
    }
    return {"name": str, "init_from_nemo_model": str, **sections}


def train(cfg: DictConfig) -> None:
    """Trains the connector between a frozen speech encoder and a frozen Megatron GPT.

        mtbi train                                  # the embedded demo: offline, 2 cores, no GPU
        mtbi train --config-name mtbi_digits data.digits_dir=DIR data.heldout_speakers=[theo]
        mtbi train model.connector.kind=stack trainer.max_steps=400

    The last line names what the run wrote: `results: PATH/results.json`.
    """
    from nemo_mtbi.commands.train import train as run
    from nemo_mtbi.parallel.groups import is_global_first

    results = run(cfg)
    if results is not None and is_global_first():
        print(f"results: {results}")


def plan(cfg: DictConfig) -> None:
    """Prints what a training run would do, and runs nothing: layout, memory of each stage, what would be refused.

        mtbi plan --config-name mtbi_llama3.1-70b_tp8_pp2
        mtbi plan trainer.devices=4 model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2

    The same as `mtbi train plan=true`; the exit status is 1 if the run would be refused.
    """
    train(cfg)


# ------------------------------------------------------------------------------------------------------------- targets


def targets_schema() -> type:
    """Return the dataclass of the configuration of target generation."""
    from nemo_mtbi.commands.targets import GenerateTargetsConfig

    return GenerateTargetsConfig


def targets(cfg: DictConfig) -> None:
    """Generates behavior targets: the text LLM answers every task's prompt about the transcripts of a corpus.

        mtbi targets cuts_path=cuts.jsonl.gz output_dir=targets
        mtbi targets manifest_filepath=a.json output_dir=OUT pretrained_llm=DIR tasks=b.yaml

    Started again after a kill, the command resumes. The last line says what to train on.
    """
    from rich.console import Console

    from nemo_mtbi.commands.targets import run

    report = run(cfg)
    if report is not None:
        report.render(Console())


# ------------------------------------------------------------------------------------------------------- transcription


def transcribe_schema() -> type:
    """Return the dataclass of the configuration of a transcription."""
    from nemo_mtbi.commands.transcribe_questions import TranscribeConfig

    return TranscribeConfig


def transcribe(cfg: DictConfig) -> None:
    """Prompts an MTBI model with audio files and writes its answers as JSONL: audio_filepath, prompt, pred_text.

        mtbi transcribe model_path=m.nemo audio=[a.wav,b.flac] prompt="what was said here?"
        mtbi transcribe model_path=m.nemo audio_dir=DIR audio_type=flac prompts_file=prompts.txt
        mtbi transcribe model_path=m.nemo dataset_manifest=test.json output_filename=out.jsonl

    Started again after an interruption, the command resumes behind its last answer. The last line names what it wrote:
    `answers: PATH`.
    """
    from rich.console import Console

    from nemo_mtbi.commands import transcribe as library
    from nemo_mtbi.io.display import printable
    from nemo_mtbi.parallel.device import pick_device

    # All of the configuration is checked before the model is loaded.
    config = library.parse_transcribe_config(cfg)
    utterances = library.read_utterances(config)
    output = library.output_path(config, utterances)
    if output.exists() and not config.overwrite_transcripts:
        print(f"answers: {printable(str(output))} (there already; overwrite_transcripts=true makes them anew)")
        return
    device = pick_device(config.cuda)

    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.parallel import groups

    groups.start_one_replica(config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    stored = MTBIModel.restore_from(config.model_path, return_config=True)
    library.spare_model(output, config.model_path, stored)

    model = MTBIModel.restore_from(config.model_path, map_location=device).eval()
    try:
        result = library.transcribe(
            model.responder(),
            utterances,
            output,
            batch_size=config.batch_size,
            on_bad_audio=config.on_bad_audio,
            show=config.show,
            model=str(sorted(model.frozen.fingerprints.items())),
        )
    except KeyboardInterrupt:  # the message on how to resume is printed already
        raise SystemExit(130) from None
    if groups.is_global_first():
        result.render(Console())
        print(f"answers: {printable(str(result.output))}")


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate_schema() -> type:
    """Return the dataclass of the configuration of an evaluation."""
    from nemo_mtbi.evaluation.settings import EvalConfig

    return EvalConfig


def evaluate(cfg: DictConfig) -> None:
    """Compares systems on held-out wordings, held-out tasks and public benchmarks; writes tables and report.html.

        mtbi evaluate output_dir=eval systems.mtbi.nemo=m.nemo sets.test.cuts=test/cuts.jsonl.gz
        mtbi evaluate --config-path DIR --config-name my_eval       # systems and sets of your own

    All systems are checked before the first one answers. Started again after a kill, the command resumes and ends with
    the same bytes. The last line names the report.
    """
    from nemo_mtbi.evaluation.settings import parse_eval_config

    # All of the configuration is checked before a model is loaded.
    config = parse_eval_config(cfg)

    from nemo_mtbi.commands.evaluate import run

    report = run(config)
    if report is not None:
        print(f"report: {report}")


HYDRA_COMMANDS = {
    "train": HydraCommand("mtbi_demo", train, train_schema),
    "plan": HydraCommand("mtbi_demo", plan, train_schema, ("plan=true",)),
    "targets": HydraCommand("mtbi_generate_targets", targets, targets_schema),
    "transcribe": HydraCommand("mtbi_transcribe", transcribe, transcribe_schema),
    "evaluate": HydraCommand("mtbi_eval", evaluate, evaluate_schema),
}
