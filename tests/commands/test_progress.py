# SPDX-License-Identifier: Apache-2.0
"""Figures worked out by hand, with a clock that moves when it is told to; and what people see of them."""

import io
import math
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from nemo_mtbi.commands.progress import (
    GIB,
    Meter,
    Report,
    RunBar,
    Throughput,
    duration,
    memory_text,
    peak_memory,
    progress_callbacks,
    speed_text,
    step_limit,
    summarize,
    time_to_end,
)
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.layouts.layout import StepBatch, collate, make_row
from nemo_mtbi.parallel import groups


class Clock:
    """Seconds, which pass when ``clock.now`` is raised."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make_batch(seconds=(1.0, 0.5), rows=(4, 2), micro_batch_tokens=8):
    """Two utterances; rows of 4 and 2 positions in one microbatch of 2 x 4, unless the bound parts them."""
    audio = [torch.zeros(int(16000 * length)) for length in seconds]
    made = [make_row([1] * (length - 1), [2, 3], index) for index, length in enumerate(rows)]
    return collate(audio, [0] * len(audio), made, micro_batch_tokens)


def report(**changes):
    values = dict(steps=10, seconds=5.0, speech=100.0, positions=600, padded=1000, memory=2 * GIB, elapsed=60.0)
    return Report(**{**values, **changes})


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_a_meter_counts_since_the_last_report():
    clock = Clock()
    meter = Meter(16000, clock)
    meter.add(make_batch())
    clock.now += 2
    meter.add(make_batch(micro_batch_tokens=1))  # two microbatches without padding
    clock.now += 1
    assert meter.report(memory=7, time_left=9.0) == Report(2, 3.0, 3.0, 12, 8 + 6, 7, 3.0, 9.0)
    clock.now += 4
    meter.skip(3)  # of them were validation
    assert meter.report(memory=8) == Report(0, 1.0, 0.0, 0, 0, 8, 7.0, math.inf)


def test_a_step_without_utterances_counts_as_a_step():
    clock = Clock()
    meter = Meter(16000, clock)
    meter.add(StepBatch.empty({"silent": 3}))
    assert meter.report(memory=1) == Report(1, 0.0, 0.0, 0, 0, 1, 0.0)


def test_replicas_add_up_and_the_processes_of_one_do_not():
    # two replicas of two processes each; the slowest process decides
    reports = [
        report(memory=1 * GIB),
        report(memory=3 * GIB, seconds=8.0),
        report(speech=60.0, positions=400, padded=600),
        report(speech=60.0, positions=400, padded=600),
    ]
    assert summarize(reports, 2) == {
        "speed/step_seconds": 0.8,
        "speed/speech_seconds_per_second": 160 / 8,
        "speed/tokens_per_second": 1000 / 8,
        "speed/fill_ratio": 1000 / 1600,
        "memory/peak_gib": 3.0,
    }


def test_no_microbatch_has_no_fill_ratio():
    assert "speed/fill_ratio" not in summarize([report(positions=0, padded=0)], 1)


@pytest.mark.parametrize(
    "reports, done, left, expected",
    [
        ([report()], 20, 40, 120.0),  # 60 s for 20 steps
        ([report(), report(elapsed=80.0)], 20, 40, 160.0),
        ([report(time_left=50.0)], 20, 40, 50.0),
        ([report(time_left=50.0), report(time_left=30.0)], 20, None, 30.0),
        ([report(time_left=-1.0)], 20, None, 0.0),
        ([report()], 20, 0, 0.0),
        ([report()], 20, None, None),
        ([report()], 0, 40, None),
    ],
)
def test_time_to_the_end(reports, done, left, expected):
    assert time_to_end(reports, done, left) == expected


@pytest.mark.parametrize(
    "max_steps, max_epochs, batches, expected",
    [
        (100, -1, math.inf, 100),
        (-1, 3, 20, 60),
        (50, 3, 20, 50),
        (70, 3, 20, 60),
        (-1, 3, math.inf, None),
        (-1, None, 20, None),
        (0, None, 20, 0),
    ],
)
def test_where_a_run_ends(max_steps, max_epochs, batches, expected):
    trainer = SimpleNamespace(max_steps=max_steps, max_epochs=max_epochs, num_training_batches=batches)
    assert step_limit(trainer) == expected


def test_memory_of_this_process():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(2**26 // 4)  # 64 MiB
    assert peak_memory(torch.device("cpu")) >= before > 100 * 2**20
    del held


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_figures_for_people():
    assert speed_text(summarize([report()], 1)) == ["0.5 s/step", "20 s of speech/s", "120 tokens/s", "60% filled"]
    assert speed_text({}) == memory_text([]) == []
    assert memory_text([report()]) == ["2.00 GiB"]
    assert memory_text([report(), report(memory=3 * GIB)]) == ["2.00 GiB (rank 1: 3.00)"]


# ------------------------------------------------------------------------------------------------------ whole training


class Module(LightningModule):
    """Stands for the model: each batch takes half a second of the clock, each validation batch ten."""

    def __init__(self, clock):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.speech_llm = SimpleNamespace(frame_counter=SimpleNamespace(sample_rate=16000))
        self.clock = clock

    def training_step(self, batch, index):
        self.clock.now += 0.5
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.weight.square()
        loss.backward()
        optimizer.step()
        self.log("train_loss", loss, prog_bar=True)

    def validation_step(self, batch, index):
        self.clock.now += 10

    def on_validation_epoch_end(self):
        self.log("val_loss", 1.25)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def fit(folder, console, steps=6, clock=None, **changes):
    """Six steps, a report every two, validation after three; returns the throughput and the logged rows."""
    groups.initialize()
    clock = clock or Clock()
    throughput = Throughput(clock)
    settings = dict(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        log_every_n_steps=2,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=CSVLogger(folder, "log", ""),
    )
    trainer = Trainer(**{**settings, **changes}, callbacks=[throughput, RunBar(throughput, console, clock)])
    train, validation = (torch.utils.data.DataLoader([make_batch()] * size, batch_size=None) for size in (20, 2))
    trainer.fit(Module(clock), train, validation)
    rows = (folder / "log" / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    return throughput, [dict(zip(names, row.split(","), strict=True)) for row in rows[1:]]


@pytest.fixture
def log():
    return Console(file=io.StringIO(), width=40)  # a file: its width does not count


def test_a_run_is_logged_as_worked_out_by_hand(tmp_path, log):
    throughput, rows = fit(tmp_path, log)
    logged = [row for row in rows if row["speed/step_seconds"]]
    assert [row["step"] for row in logged] == ["1", "3", "5"]  # Lightning counts them from 0
    for row in logged:  # without the 20 s of validation between the third and the fourth step
        assert float(row["speed/step_seconds"]) == 0.5
        assert float(row["speed/speech_seconds_per_second"]) == 3.0
        assert float(row["speed/tokens_per_second"]) == 12.0
        assert float(row["speed/fill_ratio"]) == 0.75
        assert float(row["memory/peak_gib"]) > 0.1
    assert throughput.eta == 0.0 and throughput.count == 4


def test_a_log_gets_a_line_for_each_report_and_each_validation(tmp_path, log):
    fit(tmp_path, log)
    text = log.file.getvalue()
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    figures = r"train_loss 0 · 0.5 s/step · 3 s of speech/s · 12 tokens/s · 75% filled · \d+\.\d\d GiB"
    for line, pattern in zip(
        lines,
        [
            rf"step 2/6 · {figures} · 0:02 left",
            r"step 3/6 · validated in 0:20 · val_loss 1.25",
            rf"step 4/6 · {figures} · 0:11 left",  # 22 s for 4 steps: validation is part of what is to come
            rf"step 6/6 · {figures} · 0:00 left",
            r"step 6/6 · validated in 0:20 · val_loss 1.25",
        ],
        strict=True,
    ):
        assert re.fullmatch(pattern, line), line


def screen(text):
    """What a terminal shows at the end."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\r\x1b":
            lines[row] = part
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_terminal_gets_a_bar_that_leaves_lines_behind(width, tmp_path):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    fit(tmp_path, console)
    text = console.file.getvalue()
    assert "━" in text and "validation, batch 2" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back
    first, second, last = screen(text)
    assert first.startswith("step 3/6 · validated in 0:20") and second.startswith("step 6/6 · validated in 0:20")
    assert last.startswith("step 6/6 · train_loss 0 · 0.5 s/step")
    bars = [line for line in re.split(r"[\n\r]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)) if "━" in line]
    assert max(map(len, bars)) <= width


def test_a_terminal_is_not_drawn_more_often_than_the_eye_can_see(tmp_path):
    class Fast(Clock):
        def __call__(self):
            self.now = min(self.now, 100.3)  # all of it takes less than half a second
            return self.now

    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    fit(tmp_path, console, clock=Fast(), limit_val_batches=0, steps=20)
    assert console.file.getvalue().count("training ") <= 3  # at the start, and around the line that stays


def test_a_time_limit_counts(tmp_path, log):
    throughput, _ = fit(tmp_path, log, max_steps=-1, steps=None, max_epochs=1, max_time="00:00:10:00")
    assert step_limit(SimpleNamespace(max_steps=-1, max_epochs=1, num_training_batches=20)) == 20
    assert throughput.eta == 0.0
    lines = [line for line in log.file.getvalue().splitlines() if "left" in line]
    assert lines[0].startswith("step 2/20") and lines[0].endswith("0:09 left")


def test_a_limit_of_time_alone(tmp_path, log):
    fit(tmp_path, log, steps=None, max_steps=4, max_time="00:00:00:01", limit_val_batches=0)
    assert all(line.endswith(("0:00 left", "0:01 left")) for line in log.file.getvalue().splitlines())


def test_the_bar_ends_with_an_error(tmp_path):
    class Broken(Clock):
        def __call__(self):
            if self.now > 101:
                raise RuntimeError("broken")
            return self.now

    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, console, clock=Broken(), num_sanity_val_steps=0)
    text = console.file.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is there again


def test_a_bar_that_is_off_prints_nothing(tmp_path, log):
    throughput = Throughput()
    bar = RunBar(throughput, log)
    bar.disable()
    bar.print("x")
    assert log.file.getvalue() == ""
    bar.enable()
    bar.print("x [y]")
    assert log.file.getvalue() == "x [y]\n"


def test_callbacks_of_a_run():
    throughput, bar = progress_callbacks()
    assert bar.throughput is throughput
    assert [type(callback) for callback in progress_callbacks(bar=False)] == [Throughput]
    Trainer(callbacks=progress_callbacks(False), enable_progress_bar=False, logger=False, enable_checkpointing=False)


# --------------------------------------------------------------------------------------------------- several processes


def measure(tensor):
    """Worker: two processes, of one replica or of two, agree on figures; they talk only when a report is due."""
    groups.initialize(ParallelConfig(int(tensor)))
    rank, clock = torch.distributed.get_rank(), Clock()
    throughput, logged = Throughput(clock), []
    module = SimpleNamespace(
        speech_llm=SimpleNamespace(frame_counter=SimpleNamespace(sample_rate=16000)),
        device=torch.device("cpu"),
        log_dict=logged.append,
    )
    trainer = SimpleNamespace(
        global_step=0,
        log_every_n_steps=3,
        callbacks=[],
        max_steps=9,
        max_epochs=-1,
        num_training_batches=math.inf,
    )
    throughput.on_train_start(trainer, module)
    talks, gather = [], groups.gather_objects
    groups.gather_objects = lambda *args: talks.append(trainer.global_step) or gather(*args)
    try:
        for _ in range(3):
            clock.now += 1.0 + rank
            trainer.global_step += 1
            batch = make_batch() if groups.data_parallel_rank() == 0 else make_batch((2.0, 2.0), (4, 4))
            throughput.on_train_batch_end(trainer, module, None, batch, 0)
    finally:
        groups.gather_objects = gather
    assert talks == [3]
    speech, positions, padded = (4.5, 18, 24) if int(tensor) == 2 else (4.5 + 12.0, 18 + 24, 24 + 24)
    (values,) = logged
    peak = values.pop("memory/peak_gib")
    assert values == {
        "speed/step_seconds": 2.0,  # of the slower process
        "speed/speech_seconds_per_second": speech / 6,
        "speed/tokens_per_second": positions / 6,
        "speed/fill_ratio": positions / padded,
    }
    assert throughput.eta == 12.0
    assert groups.gather_objects((peak, throughput.values, throughput.eta)) == [(peak, throughput.values, 12.0)] * 2
    assert peak == max(report.memory for report in throughput.reports) / GIB


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_processes_agree(tensor, processes):
    processes(measure, tensor, timeout=120)
