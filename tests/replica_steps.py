# SPDX-License-Identifier: Apache-2.0
"""Steps that are known beforehand, and loaders of them, for the tests of the replica loader."""

import torch

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.data.passes import Passes
from nemo_mtbi.layouts.layout import RowInfo, StepBatch, collate, make_row, speech
from nemo_mtbi.parallel import groups

LAYOUTS = {  # name: layout and data-parallel size
    "dp2": (ParallelConfig(), 2),
    "tp2": (ParallelConfig(2), 1),
    "pp2": (ParallelConfig(1, 2), 1),
    "tp2_pp2": (ParallelConfig(2, 2), 1),
    "tp2_dp2": (ParallelConfig(2), 2),
    "pp2_dp2": (ParallelConfig(1, 2), 2),
}
ONLY_SKIPPED = 2  # number of the step whose cuts were all left out
LIMIT = 60  # seconds after which a collective that nobody joins fails


# Data -------------------------------------------------------------


def make_step(key):
    """A step that ``key`` alone decides: ragged audio, several microbatches, rows and counts."""
    rank, epoch, number = key
    if number == ONLY_SKIPPED:
        return StepBatch.empty({"silent": rank + 1})
    generator = torch.Generator().manual_seed(10_000 * rank + 100 * epoch + number)
    audio = [torch.randn(160 + 40 * u + number, generator=generator) for u in range(1 + number % 3)]
    frames = [2 + u for u in range(len(audio))]
    rows = [make_row([1, *speech(0, n), 5, 6][: 9 - u], [7 + number] * (1 + u), u) for u, n in enumerate(frames)]
    batch = collate(audio, frames, rows, 9, [f"cut-{rank}-{epoch}-{number}-{u}" for u in range(len(audio))])
    batch.rows = [RowInfo(0, batch.cut_ids[0], "repeat", (1, -1), "say", "answer", False, "words")]
    batch.stats, batch.skipped = {"no_alignment": number}, {"too_short": epoch}
    return batch


class Keys(Passes, torch.utils.data.Sampler):
    def __init__(self, rank, count, fixed=False):
        super().__init__(fixed)
        self.rank, self.count = rank, count

    def __iter__(self):
        epoch, consumed = self.take()
        yield from ((self.rank, epoch, number) for number in range(consumed, self.count))
        self.ended(epoch)


class Sized(Keys):
    def __len__(self):
        return self.count


class Steps(torch.utils.data.Dataset):
    """Makes steps, counts them, and fails at one."""

    def __init__(self, fail_at=None):
        self.fail_at = fail_at
        self.made = 0

    def __getitem__(self, key):
        if key[2] == self.fail_at:
            raise KeyError(f"shard {key[0]} is broken: mend it")
        self.made += 1
        return make_step(key)


def plain(rank=0, count=5, fail_at=None, workers=0, keys=Keys):
    return torch.utils.data.DataLoader(Steps(fail_at), sampler=keys(rank, count), batch_size=None, num_workers=workers)


def tensors(batch):
    """Name to tensor, of all tensors of a step but its audio."""
    found = {"audio_lengths": batch.audio_lengths, "frame_lengths": batch.frame_lengths}
    for number, microbatch in enumerate(batch.microbatches):
        found |= {f"{name}{number}": value for name, value in vars(microbatch).items()}
    return found


def check_equal(found, expected, audio=True):
    """Bit for bit. Without audio there is a row of nothing for each utterance."""
    mine, theirs = tensors(found), tensors(expected)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for name in ("num_targets", "cut_ids", "rows", "stats", "skipped"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.audio.dtype == torch.float32
    if audio:
        assert torch.equal(found.audio, expected.audio)
    else:
        assert found.audio.shape == (len(expected.audio_lengths), 0)


def is_empty(batch):
    return not batch.microbatches and not len(batch.audio_lengths) and not batch.num_targets and not batch.skipped


def on_all(value):
    """Of what each process of the world has, the one value."""
    first, *others = groups.gather_objects(value)
    assert all(other == first for other in others), (first, others)
    return first


def start(name):
    layout, replicas = LAYOUTS[name]
    groups.initialize(layout, timeout=LIMIT)
    assert groups.data_parallel_size() == replicas
    return groups.data_parallel_rank(), replicas


def run(processes, function, name, *arguments):
    layout, replicas = LAYOUTS[name]
    processes(function, name, *arguments, count=layout.model_parallel_size * replicas)
