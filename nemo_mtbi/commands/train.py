# SPDX-License-Identifier: Apache-2.0
"""One training run from its configuration to its results: what ``examples/mtbi_train.py`` calls."""

from __future__ import annotations

import difflib
import inspect
import os
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from nemo.utils.exp_manager import StatelessTimer
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from nemo_mtbi.commands.experiment import Experiment, experiment
from nemo_mtbi.commands.progress import progress_callbacks, step_limit
from nemo_mtbi.commands.run_folder import spare_inputs
from nemo_mtbi.config.model import ModelConfig, parse_model_config
from nemo_mtbi.config.schema import explain, read_section
from nemo_mtbi.data.gate import GatedCuts, open_manifest
from nemo_mtbi.data.loader_config import check_config
from nemo_mtbi.demo.recipe import DataConfig, Prepared, load_pool, parse_data_config, prepare
from nemo_mtbi.evaluation.benchmark import run_benchmark
from nemo_mtbi.evaluation.report import Answer, examples_markdown, render, summarize, write_results
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.io.sources import FILES
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.models.resuming import run_settings
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.checkpoint.plugin import ShardedCheckpointIO
from nemo_mtbi.parallel.settings import check_same
from nemo_mtbi.parallel.stop import Remedies, StopOnSignal, explained
from nemo_mtbi.parallel.strategy import MTBIStrategy
from nemo_mtbi.planning.layout_table import show_start
from nemo_mtbi.planning.plan import make_plan
from nemo_mtbi.planning.report import show_plan
from nemo_mtbi.speech_llm.model import LayoutDecoder
from nemo_mtbi.speech_llm.pretrained import load_text_llm
from nemo_mtbi.targets.tasks import TaskPool

console = Console(width=max(100, Console().width))  # the tables need 100 columns
SECTIONS = ("name", "seed", "data", "model", "benchmark", "trainer", "exp_manager")
SECTIONS += ("plan", "init_from_nemo_model", "init_strict")
PRECISIONS = {  # Lightning's name: frozen_dtype of the model, or as the model says
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
    """What is asked at the end of a run.

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


class Stopwatch(Callback):
    """Times the fit, without what comes before and after."""

    def __init__(self):
        self.seconds, self._start = 0.0, None

    def on_train_start(self, trainer, module):
        self._start = time.monotonic()

    def on_train_end(self, trainer, module):
        if self._start is not None:
            self.seconds, self._start = time.monotonic() - self._start, None

    def teardown(self, trainer, module, stage):
        self.on_train_end(trainer, module)  # NeMo's time limit ends a fit without another hook


def train(cfg: DictConfig) -> Path | None:
    """Prepares the data, trains the connector, saves the ``.nemo``, runs the benchmark and writes ``results.json``.

    Every process of a run calls it.

    Returns:
        The path of ``results.json``, or of the ``.nemo`` if there is no benchmark. ``None`` if a signal has stopped
        the run, or only its plan was asked for.

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
        return _train(cfg, remedies, *_check(cfg))


def _train(
    cfg: DictConfig, remedies: Remedies, model_config: ModelConfig, data: DataConfig | None, benchmark: BenchmarkConfig
) -> Path | None:
    """Starts the processes of a run, takes its folder, and does it there."""
    spare_inputs(OmegaConf.to_container(cfg))
    pool, watch = load_pool(benchmark.tasks), Stopwatch()
    stop = StopOnSignal(lambda: trainer.lightning_module.agreed_to_stop)
    bar = cfg.trainer.get("enable_progress_bar") is not False
    trainer = make_trainer(cfg, model_config, [watch, stop, *progress_callbacks(bar, console)])
    if data:
        cache = os.path.expanduser(data.cache_dir)
        remedies.places[cache] = "data.cache_dir, or the environment variable NEMO_MTBI_CACHE"
    if model_config.encoder_cache:
        remedies.places[model_config.encoder_cache] = "model.encoder_cache"
    with experiment(trainer, cfg.exp_manager) as run:
        remedies.places[str(run.folder)] = "exp_manager.exp_dir"
        remedies.go_on = f"To go on from the last checkpoint, {run.go_on}"
        if run.resumed is not None:
            _say("resuming", f"from {run.resumed}")
        return _run(cfg, model_config, data, benchmark, pool, trainer, run, watch, stop)


def _run(
    cfg: DictConfig,
    model_config: ModelConfig,
    data: DataConfig | None,
    benchmark: BenchmarkConfig,
    pool: TaskPool,
    trainer: Trainer,
    run: Experiment,
    watch: Stopwatch,
    stop: StopOnSignal,
) -> Path | None:
    """Everything from the data to the results of a run whose processes have started."""
    started = time.monotonic()
    if data:
        _say("data", "corpora, encoder and the text LLM's answers (cached)")
        prepared = prepare(data, asdict(model_config))
        pool, benchmark.cuts = asked_of(benchmark, pool, prepared)
        with open_dict(cfg):
            cfg.model.pretrained_asr = prepared.pretrained_asr
            cfg.model.train_ds.cuts_path = str(prepared.train)
            cfg.model.validation_ds.cuts_path = str(prepared.validation)
    if benchmark.enabled and benchmark.cuts:
        _benchmark_cuts(benchmark)  # what can't be read is found now, and not after the training
    seed_everything(cfg.seed, verbose=False)
    model = MTBIModel(cfg.model, trainer)
    model.maybe_init_from_pretrained_checkpoint(cfg)
    model.run_settings = run_settings(cfg)
    model.wants_to_stop = lambda: stop.requested is not None
    _say("training", _sizes(model))
    if groups.layout().model_parallel_size * groups.data_parallel_size() > 1:
        show_start(model.speech_llm, console, cfg.model.train_ds.get("batch_tokens"), model_config.micro_batch_tokens)
    trainer.fit(model, ckpt_path=trainer.ckpt_path)
    early = _early_end(trainer, stop, run)
    if stop.stopped:
        _say("stopped", early)
        return None
    if early:
        _say("time is over", early)
    nemo = written = run.folder / f"{cfg.name}.nemo"
    model.save_to(str(nemo))
    if benchmark.enabled and benchmark.cuts:
        _say("benchmark", "every task on every test utterance, by text and by speech")
        cuts = _benchmark_cuts(benchmark)
        answers = run_benchmark(model.responder(), cuts, pool, benchmark.seed, reader=_reader(model))
        figures = {"seconds": watch.seconds, "steps": trainer.global_step, "peak_rss_gib": peak_rss_gib()}
        written = run.folder / "results.json"
        if groups.is_global_first():
            _report(answers, written, trainer, seed=cfg.seed, train=figures, nemo=nemo)
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


def asked_of(benchmark: BenchmarkConfig, pool: TaskPool, prepared: Prepared) -> tuple[TaskPool, str]:
    """Return the task pool and the cuts of the benchmark: the user's own, else those of the ``data:`` section."""
    return (prepared.pool, str(prepared.test)) if benchmark.cuts is None else (pool, benchmark.cuts)


def _reader(model: MTBIModel) -> Responder | None:
    """The LLM as it was, where training has changed it itself; it takes the memory of a second one."""
    if not model.speech_llm.llm_state.weights_train:
        return None
    config, dtype = model.config, model.speech_llm.decoder.config.params_dtype
    found = load_text_llm(config.pretrained_llm, dtype, chat=config.chat)
    return Responder(LayoutDecoder(found.chunks).to(model.device), found.chat, config.generation)


def make_trainer(cfg: DictConfig, config: ModelConfig, callbacks: list[Callback]) -> Trainer:
    """Lightning's trainer with our strategy, whose processes and groups have started."""
    precision = cfg.trainer.get("precision", "32-true")
    if PRECISIONS[precision] is not None:
        with open_dict(cfg):
            cfg.model.frozen_dtype = PRECISIONS[precision]
    settings = {key: value for key, value in cfg.trainer.items() if key not in ("precision", "strategy")}
    checkpoints = ShardedCheckpointIO(
        lambda: trainer.lightning_module.state_dict(keep_vars=True),
        lambda: trainer.optimizers,
        cfg.seed,
        llm=lambda: trainer.lightning_module.llm_optimizer,
    )
    started = OmegaConf.to_container(cfg)
    strategy = MTBIStrategy(config.layout, config.dist_timeout, lambda: check_same(started), checkpoint_io=checkpoints)
    trainer = Trainer(**settings, precision="32-true", strategy=strategy, callbacks=callbacks)
    seed_everything(cfg.seed, verbose=False)
    strategy.start(trainer)
    return trainer


def _check(cfg: DictConfig) -> tuple[ModelConfig, DataConfig | None, BenchmarkConfig]:
    """Checks the sections and resolves their interpolations, in place."""
    _check_keys(cfg, SECTIONS, "section ")
    _check_keys(cfg.get("trainer") or {}, inspect.signature(Trainer).parameters, "key trainer.")
    for name in REQUIRED:
        if OmegaConf.select(cfg, name) is None:
            raise ValueError(f"{name} is missing: set it in the YAML or on the command line")
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, "config")) from error
    precision = cfg.trainer.get("precision", "32-true")
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision is {precision!r}; it must be one of {', '.join(map(str, PRECISIONS))}")
    if cfg.trainer.get("strategy") is not None:
        raise ValueError(
            "trainer.strategy must not be set: ours follows from model.tensor_model_parallel_size and its like"
        )
    _check_processes(cfg.trainer)
    benchmark = read_section(BenchmarkConfig, cfg.get("benchmark"), "benchmark")
    model = parse_model_config(cfg.model)
    for name in ("train_ds", "validation_ds"):
        check_config(cfg.model[name], cfg.model[name].get("sample_rate") or 16000)  # the model checks the rate
    return model, parse_data_config(cfg.data) if cfg.get("data") else None, benchmark


def _check_processes(trainer: Mapping) -> None:
    """Compares ``trainer.devices`` with what torchrun has started; Lightning would say it in terms of its own."""
    started, devices = os.environ.get("LOCAL_WORLD_SIZE"), trainer.get("devices", "auto")
    if started is not None and isinstance(devices, int) and devices > 0 and devices != int(started):
        raise ValueError(
            f"torchrun has started {started} processes on this machine, but trainer.devices is {devices}: set it to "
            f"{started}, or start {devices} with --nproc-per-node"
        )


def _check_keys(given: Mapping, known: Iterable[str], what: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"unknown {what}{key}: {hint}")


def _benchmark_cuts(benchmark: BenchmarkConfig) -> GatedCuts:
    return open_manifest(benchmark.cuts, FILES, remedy="leave the cut out", key="benchmark.cuts")


def _report(answers: list[Answer], path: Path, trainer: Trainer, *, seed: int, train: dict, nemo: Path) -> None:
    """Prints the tables, writes ``results.json``, and puts figures and examples on TensorBoard."""
    summary = summarize(answers)
    render(summary, answers, console)
    write_results(path, summary=summary, seed=seed, train=train, nemo_path=str(nemo))
    board = getattr(trainer.logger, "experiment", None)
    if hasattr(board, "add_text"):  # other loggers than TensorBoard's have other methods
        board.add_text("examples", examples_markdown(answers), trainer.global_step)
        for group, figures in summary["behavior"].items():
            if figures["n"]:
                board.add_scalar(f"benchmark/{group}", figures["agreement"], trainer.global_step)
        board.flush()


def peak_rss_gib() -> float:
    """Most memory this process has held, in GiB."""
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
