# SPDX-License-Identifier: Apache-2.0
"""Trains, saves and benchmarks a model from a configuration: the library of ``mtbi train``."""

from __future__ import annotations

import inspect
import os
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from nemo.utils.exp_manager import StatelessTimer
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from nemo_mtbi.commands.experiment import Experiment, experiment
from nemo_mtbi.commands.progress import progress_callbacks, step_limit
from nemo_mtbi.commands.run_folder import spare_inputs
from nemo_mtbi.config.checks import OneOf, suggestion
from nemo_mtbi.config.model import ModelConfig, parse_model_config
from nemo_mtbi.config.schema import explain_config_error, read_section
from nemo_mtbi.data.gate import open_manifest
from nemo_mtbi.data.loader_config import check_config
from nemo_mtbi.demo.recipe import DataConfig, Prepared, load_pool, parse_data_config, prepare
from nemo_mtbi.evaluation.benchmark import (
    TrainingRecord,
    benchmark_config,
    benchmark_results,
    benchmark_set,
    run_benchmark,
)
from nemo_mtbi.evaluation.examples import Example, examples_markdown, examples_of
from nemo_mtbi.evaluation.files import write_json
from nemo_mtbi.evaluation.items import EvalSet
from nemo_mtbi.evaluation.systems import SpeechSystem, TextSystem
from nemo_mtbi.evaluation.terminal import print_summary
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.io.sources import FILES
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.models.resuming import run_settings
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.checkpoint.plugin import ShardedCheckpointIO
from nemo_mtbi.parallel.settings import check_same
from nemo_mtbi.parallel.stop import Remedies, StopOnSignal, explained
from nemo_mtbi.parallel.strategy import MTBIStrategy
from nemo_mtbi.planning.build import make_plan
from nemo_mtbi.planning.layout_table import show_start
from nemo_mtbi.planning.report import show_plan
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
from nemo_mtbi.speech_llm.pretrained import load_text_llm
from nemo_mtbi.targets.tasks import TaskPool

console = Console(width=max(100, Console().width))  # the tables need 100 columns
SECTIONS = (
    *("name", "seed", "data", "model", "benchmark", "trainer", "exp_manager"),
    *("plan", "init_from_nemo_model", "init_strict"),
)
# Lightning's name → model.frozen_dtype; ``None``: as the ``model:`` section says
PRECISIONS: dict[str | int, str | None] = {
    "32-true": None,
    "32": None,
    32: None,
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "bf16": "bfloat16",
}
REQUIRED = ("name", "seed", "model", "model.train_ds", "model.validation_ds", "model.optim", "trainer", "exp_manager")


@dataclass
class BenchmarkConfig:
    """The benchmark at the end of a run.

    Attributes:
        enabled: ``false`` if ``examples/mtbi_eval.py`` is to judge the model later.
        cuts: test utterances; ``null``: those of ``data:``. Without either there is no benchmark.
        tasks: task pool YAML, or ``demo``.
        seed: of the wordings.
    """

    enabled: bool = True
    cuts: str | None = None
    tasks: str = "demo"
    seed: int = 0


@dataclass(frozen=True)
class RunConfig:
    """The checked sections of a configuration.

    Attributes:
        model: section ``model``, with the ``frozen_dtype`` of ``trainer.precision``.
        data: section ``data``; ``None``: the user brings cuts.
        benchmark: section ``benchmark``.
    """

    model: ModelConfig
    data: DataConfig | None
    benchmark: BenchmarkConfig


class Stopwatch(Callback):
    """Times the fit, without what comes before and after.

    Attributes:
        seconds: of the last fit.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        if self._start is not None:
            self.seconds, self._start = time.monotonic() - self._start, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the clock where NeMo's time limit has ended the fit without another hook."""
        self.on_train_end(trainer, pl_module)


def train(cfg: DictConfig) -> Path | None:
    """Prepare the data, train the connector, save the ``.nemo``, run the benchmark and write ``results.json``.

    Every process of a run calls it.

    Returns:
        The path of ``results.json``, or of the ``.nemo`` if there is no benchmark. ``None`` if a signal has stopped
        the run, or with ``plan=true``.

    Raises:
        ValueError: for a key that is unknown, missing or contradictory. All sections are checked before work begins.
        RuntimeError: if another process is lost.
    """
    if cfg.get("plan"):
        plan = make_plan(cfg, _check, frozen_dtype=PRECISIONS.get(cfg.trainer.get("precision")))
        show_plan(plan, console)
        if plan.problems:
            raise SystemExit(1)
        return None
    with explained() as remedies:
        return _train(cfg, _check(cfg), remedies)


def _train(cfg: DictConfig, config: RunConfig, remedies: Remedies) -> Path | None:
    """Start the processes of a run, lock its folder, and run there."""
    spare_inputs(_plain(cfg))
    pool, watch = load_pool(config.benchmark.tasks), Stopwatch()
    stop = StopOnSignal(lambda: trainer.lightning_module.agreed_to_stop)
    bar = cfg.trainer.get("enable_progress_bar") is not False
    trainer = make_trainer(cfg, config.model, [watch, stop, *progress_callbacks(bar, console)])
    if config.data:
        cache = os.path.expanduser(config.data.cache_dir)
        remedies.places[cache] = "data.cache_dir, or the environment variable NEMO_MTBI_CACHE"
    if config.model.encoder_cache:
        remedies.places[config.model.encoder_cache] = "model.encoder_cache"
    with experiment(trainer, cfg.exp_manager) as run:
        remedies.places[str(run.folder)] = "exp_manager.exp_dir"
        remedies.go_on = f"To go on from the last checkpoint, {run.go_on}"
        if run.resumed is not None:
            _say("resuming", f"from {run.resumed}")
        return _run(cfg, config, pool, trainer, run, watch, stop)


def _run(
    cfg: DictConfig,
    config: RunConfig,
    pool: TaskPool,
    trainer: Trainer,
    run: Experiment,
    watch: Stopwatch,
    stop: StopOnSignal,
) -> Path | None:
    """Do everything from the data to the results; the processes have started."""
    started, benchmark, test = time.monotonic(), config.benchmark, config.benchmark.cuts
    if config.data:
        _say("data", "corpora, encoder and the text LLM's answers (cached)")
        prepared = prepare(config.data, config.model)
        pool, test = benchmark_source(benchmark, pool, prepared)
        with open_dict(cfg):  # the model is built from this section, and stores it
            cfg.model.pretrained_asr = prepared.pretrained_asr
            cfg.model.train_ds.cuts_path = str(prepared.train)
            cfg.model.validation_ds.cuts_path = str(prepared.validation)
    questions = None  # of the benchmark; made now, so that errors in them cost no time
    if benchmark.enabled and test:
        questions = _benchmark_questions(test, pool, benchmark.seed)
    seed_everything(cfg.seed, verbose=False)
    model = MTBIModel(cfg.model, trainer)
    model.maybe_init_from_pretrained_checkpoint(cfg)
    model.run_settings = run_settings(cfg)
    model.wants_to_stop = lambda: stop.requested is not None
    _say("training", _sizes(model))
    if groups.layout().model_parallel_size * groups.data_parallel_size() > 1:
        show_start(model.speech_llm, console, cfg.model.train_ds.get("batch_tokens"), config.model.micro_batch_tokens)
    trainer.fit(model, ckpt_path=trainer.ckpt_path)
    early = _early_end(trainer, stop, run)
    if stop.stopped:
        _say("stopped", early)
        return None
    if early:
        _say("time is over", early)
    nemo = written = run.folder / f"{cfg.name}.nemo"
    model.save_to(str(nemo))
    if questions is not None:
        _say("benchmark", "every task on every test utterance, by text and by speech")
        written = _benchmark(cfg, model, trainer, questions, nemo, watch.seconds)
    _say(
        "done",
        f"{time.monotonic() - started:.0f} s in all, {watch.seconds:.0f} s of them training; model: {nemo}"
        + (f"; it was trained only {early}" if early else ""),
    )
    return written


def _early_end(trainer: Trainer, stop: StopOnSignal, run: Experiment) -> str:
    """Return why training ended before its last step, how far it is, and how to go on; empty if it did not."""
    last = step_limit(trainer)
    timers = (one for one in trainer.callbacks if isinstance(one, Timer) and one.time_remaining() is not None)
    timer = next((one for one in timers if one.time_remaining() <= 0), None)
    longer = ""
    if stop.stopped:
        cause = f"by {stop.requested or 'a signal'}"
    elif timer is None or last is not None and trainer.global_step >= last:
        return ""
    elif isinstance(timer, StatelessTimer):
        cause = "by exp_manager.max_time_per_run"
    else:
        cause, longer = "by trainer.max_time", ", and a longer trainer.max_time, which counts the time of all runs"
    where = f"after step {trainer.global_step}" + ("" if last is None else f" of {last}")
    saved = trainer.checkpoint_callback.last_model_path if trainer.checkpoint_callback else ""
    if not saved:
        return f"{cause} {where}; no checkpoint was configured to go on from"
    return f"{cause} {where}; to go on, {run.go_on}{longer}; checkpoint: {saved}"


def benchmark_source(benchmark: BenchmarkConfig, pool: TaskPool, prepared: Prepared) -> tuple[TaskPool, str]:
    """Return the task pool and the cuts of the benchmark: the user's own, else those of the ``data:`` section."""
    return (prepared.pool, str(prepared.test)) if benchmark.cuts is None else (pool, benchmark.cuts)


def _original_llm(model: MTBIModel) -> Responder | None:
    """Load the LLM as it was before training, if training changed its weights; else return ``None``."""
    if not model.speech_llm.llm_state.weights_train:
        return None
    config, dtype = model.config, model.speech_llm.decoder.config.params_dtype
    llm = load_text_llm(config.pretrained_llm, dtype, chat=config.chat)
    return Responder(LayoutDecoder(llm.chunks).to(model.device), llm.chat, config.generation)


def make_trainer(cfg: DictConfig, config: ModelConfig, callbacks: list[Callback]) -> Trainer:
    """Return Lightning's trainer with our strategy, whose processes and groups have started.

    Args:
        cfg: the whole configuration; its precision is that of the model, and not Lightning's.
        config: its section ``model``.
        callbacks: of the trainer.
    """
    settings = {key: value for key, value in cfg.trainer.items() if key not in ("precision", "strategy")}
    checkpoints = ShardedCheckpointIO(
        lambda: trainer.lightning_module.state_dict(keep_vars=True),
        lambda: trainer.optimizers,
        cfg.seed,
        llm=lambda: trainer.lightning_module.llm_optimizer,
    )
    started = _plain(cfg)
    strategy = MTBIStrategy(config.layout, config.dist_timeout, lambda: check_same(started), checkpoint_io=checkpoints)
    trainer = Trainer(**settings, precision="32-true", strategy=strategy, callbacks=callbacks)
    seed_everything(cfg.seed, verbose=False)
    strategy.start(trainer)
    return trainer


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain dictionaries and lists."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg))  # of a DictConfig it is a dict


def _check(cfg: DictConfig) -> RunConfig:
    """Check the sections; resolve interpolations and set ``model.frozen_dtype`` in place.

    Raises:
        ValueError: for a key that is unknown, missing or contradictory.
    """
    _check_keys(cfg, SECTIONS, "section ")
    _check_keys(cfg.get("trainer") or {}, inspect.signature(Trainer).parameters, "key trainer.")
    for name in REQUIRED:
        if OmegaConf.select(cfg, name) is None:
            raise ValueError(f"{name} is missing: set it in the YAML or on the command line")
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise ValueError(explain_config_error(error, "config")) from error
    precision = cfg.trainer.get("precision", "32-true")
    OneOf(*dict.fromkeys(map(str, PRECISIONS))).check("trainer.precision", str(precision))
    if cfg.trainer.get("strategy") is not None:
        raise ValueError(
            "trainer.strategy must not be set: ours follows from model.tensor_model_parallel_size and its like"
        )
    _check_processes(cfg.trainer)
    benchmark = read_section(BenchmarkConfig, cfg.get("benchmark"), "benchmark")
    if PRECISIONS[precision] is not None:
        with open_dict(cfg):
            cfg.model.frozen_dtype = PRECISIONS[precision]
    model = parse_model_config(cfg.model)
    for name in ("train_ds", "validation_ds"):
        check_config(cfg.model[name], cfg.model[name].get("sample_rate") or 16000)  # the model checks the rate
    return RunConfig(model, parse_data_config(cfg.data) if cfg.get("data") else None, benchmark)


def _check_processes(trainer: Mapping) -> None:
    """Compare ``trainer.devices`` with what torchrun has started; Lightning's own message names other keys.

    Raises:
        ValueError: if they differ.
    """
    started, devices = os.environ.get("LOCAL_WORLD_SIZE"), trainer.get("devices", "auto")
    if started is not None and isinstance(devices, int) and devices > 0 and devices != int(started):
        raise ValueError(
            f"torchrun has started {started} processes on this machine, but trainer.devices is {devices}: set it to "
            f"{started}, or start {devices} with --nproc-per-node"
        )


def _check_keys(given: Mapping, known: Iterable[str], what: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"unknown {what}{key}: {suggestion(key, known)}")


def _benchmark_questions(path: str, pool: TaskPool, seed: int) -> EvalSet:
    """Return the questions of the benchmark about the cuts of a manifest."""
    cuts = open_manifest(path, FILES, remedy="leave the cut out", key="benchmark.cuts")
    return benchmark_set(cuts, pool, seed)


def _benchmark(
    cfg: DictConfig, model: MTBIModel, trainer: Trainer, questions: EvalSet, nemo: Path, seconds: float
) -> Path:
    """Evaluate a trained model against its text LLM, and report; return the path of ``results.json``."""
    original, path = _original_llm(model), nemo.parent / "results.json"
    text = TextSystem(original or model.responder().without_adapters())
    answered = run_benchmark(SpeechSystem(model.responder()), text, questions)
    if groups.is_global_first():
        llm = model.config.pretrained_llm if original else None
        config = benchmark_config(f"{cfg.name} after training", nemo, llm)
        record = TrainingRecord(seconds, trainer.global_step, peak_rss_gib())
        results = benchmark_results(config, answered, cfg.seed, record)
        examples = examples_of(answered, config)
        print_summary(results, examples, console)
        write_json(path, results)
        _log_benchmark(trainer, results, examples)
    return path


def _log_benchmark(trainer: Trainer, results: Mapping[str, Any], examples: Sequence[Example]) -> None:
    """Put figures and examples of the benchmark on TensorBoard."""
    board = getattr(trainer.logger, "experiment", None)
    if board is not None and hasattr(board, "add_text"):  # other loggers than TensorBoard's have other methods
        board.add_text("examples", examples_markdown(examples), trainer.global_step)
        for group, figures in results["behavior"].items():
            if figures["n"]:
                board.add_scalar(f"benchmark/{group}", figures["agreement"], trainer.global_step)
        board.flush()


def peak_rss_gib() -> float:
    """Return the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _sizes(model: MTBIModel) -> str:
    count = {False: 0, True: 0}
    for value in model.parameters():
        count[value.requires_grad] += value.numel()
    rate = 1 / model.speech_llm.frame_counter.frame_seconds
    return f"{count[True] / 1e6:.2f} M trained and {count[False] / 1e6:.2f} M frozen parameters, {rate:g} frames/s"


def _say(stage: str, text: str) -> None:
    if groups.is_global_first():
        # a line that the console breaks could not be typed again
        console.print(f"[bold]{stage}[/bold] · {escape(text)}", highlight=False, soft_wrap=True)
