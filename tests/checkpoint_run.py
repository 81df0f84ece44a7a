# SPDX-License-Identifier: Apache-2.0
"""A run whose state the checkpoint tests save and load, in several processes."""

import random
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from nemo_mtbi.config.parallel import ParallelConfig

LAYOUTS = {  # name: layout and data-parallel size
    "single": (ParallelConfig(), 1),
    "dp2": (ParallelConfig(), 2),
    "tp2": (ParallelConfig(2), 1),
    "pp2": (ParallelConfig(1, 2), 1),
    "tp2_pp2": (ParallelConfig(2, 2), 1),
    "tp2_dp2": (ParallelConfig(2), 2),
    "pp4": (ParallelConfig(1, 4), 1),
}


def count(name):
    layout, data = LAYOUTS[name]
    return layout.model_parallel_size * data


def start(name):
    """Starts the groups of a layout in a worker."""
    from nemo_mtbi.parallel import groups

    layout, data = LAYOUTS[name]
    groups.initialize(layout, timeout=240)
    assert groups.data_parallel_size() == data


def whole(seed, *shape):
    """A tensor that is the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHARED = {"columns": ((8, 6), 0, 1), "rows": ((6, 8), 1, 1), "gated": ((8, 6), 0, 2)}  # shape, axis, parts


def share(tensor, axis, parts):
    """This process's share of a tensor."""
    from nemo_mtbi.parallel import groups

    size, rank = groups.layout().tensor_model_parallel_size, groups.tensor_parallel_rank()
    return torch.cat([part.chunk(size, axis)[rank] for part in tensor.chunk(parts, axis)], axis)


class Model(torch.nn.Module):
    """A connector on the first stage, whole in every process, and adapters that tensor-parallel processes share."""

    def __init__(self):
        from nemo_mtbi.parallel import groups

        super().__init__()
        if not groups.is_first_stage():
            return
        self.whole = torch.nn.Parameter(whole(1, 5, 3))
        self.register_buffer("scale", whole(2, 3))
        for seed, (name, (shape, axis, parts)) in enumerate(SHARED.items(), 3):
            value = torch.nn.Parameter(share(whole(seed, *shape), axis, parts))
            value.tensor_model_parallel, value.partition_dim, value.partition_stride = True, axis, parts
            self.register_parameter(name, value)

    def step(self, optimizer, number):
        """An optimizer step with gradients that do not depend on the layout."""
        for seed, (name, parameter) in enumerate(self.named_parameters(), 1000 * number):
            if name in SHARED:
                shape, axis, parts = SHARED[name]
                parameter.grad = share(whole(seed, *shape), axis, parts)
            else:
                parameter.grad = whole(seed, *parameter.shape)
        if optimizer:
            optimizer.step()


class Run:
    """What a strategy would hold."""

    def __init__(self):
        from nemo_mtbi.parallel.checkpoint.plugin import ShardedCheckpointIO

        self.model = Model()
        parameters = list(self.model.parameters())
        self.optimizers = [torch.optim.AdamW(parameters, 0.1)] if parameters else []
        self.io = ShardedCheckpointIO(
            lambda: self.model.state_dict(keep_vars=True), lambda: self.optimizers, seed=7, timeout=30
        )

    def train(self, *numbers):
        for number in numbers:
            self.model.step(self.optimizers[0] if self.optimizers else None, number)

    def checkpoint(self, step):
        """What Lightning would hand over."""
        return {
            "epoch": 1,
            "global_step": step,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": self.model.state_dict(),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
            "callbacks": {"ModelCheckpoint": {"best": torch.tensor(0.5), "path": Path("x.ckpt")}},
            "optimizer_states": [optimizer.state_dict() for optimizer in self.optimizers],
            "lr_schedulers": [{"last_epoch": step, "base_lrs": [0.1]}] if self.optimizers else [],
            "hparams_name": "cfg",
            "hyper_parameters": OmegaConf.create({"a": 1, "b": {"c": [1, "${a}"]}}),
            "hparams_type": type(OmegaConf.create()),
            "data_position": {"epoch": 1, "batches": step},
        }

    def save(self, path, step, **options):
        self.io.save_checkpoint(self.checkpoint(step), path, **options)

    def resume(self, path):
        from nemo_mtbi.parallel import random_states

        checkpoint = self.io.load_checkpoint(path)
        self.model.load_state_dict(checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        random_states.restore(checkpoint["random_states"])
        return checkpoint


def state_of(run):
    """Weights and optimizer state by name."""
    names = [name for name, _ in run.model.named_parameters()]
    state = run.optimizers[0].state_dict()["state"] if run.optimizers else {}
    return {
        "weights": {name: value.clone() for name, value in run.model.state_dict().items()},
        "optimizer": {names[i]: {k: v.clone() for k, v in entries.items()} for i, entries in state.items()},
    }


def assert_equal(found, expected):
    """Bitwise."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_equal(found[key], value)
        else:
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def seed_generators():
    from nemo_mtbi.parallel import groups

    seed = groups.data_parallel_rank()
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def draw():
    """Random numbers of each generator; normal ones, whose generators keep a second number for later."""
    return torch.tensor([random.random(), random.gauss(0, 1), np.random.randn(), torch.randn(1).item()])


def checkpoint_files():
    from nemo_mtbi.parallel.checkpoint import files

    return files
