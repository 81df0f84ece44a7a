# SPDX-License-Identifier: Apache-2.0
"""Adapters and weights whose values are a function of their names: the same in every layout."""

import zlib

import torch

ALL = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class Drawn:
    """A source of whole tensors of the shapes given."""

    def __init__(self, shapes):
        self._shapes = shapes

    def shape(self, name):
        return self._shapes[name]

    def rows(self, name, axis, start, stop):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(self._shapes[name], generator=generator, dtype=torch.float64) * 0.3
        return whole.narrow(axis, start, stop - start)


def draw_learned(chunks):
    """Fills this process's share of the weights of an LLM that train."""
    from nemo_mtbi.llm.architecture import weight_shapes
    from nemo_mtbi.llm.full_finetune import trained_weights
    from nemo_mtbi.llm.weights import load_shares

    load_shares(trained_weights(chunks).items(), Drawn(weight_shapes(chunks[0].architecture)))


def draw_adapters(chunks):
    """Fills this process's share of the adapters of an LLM."""
    from nemo_mtbi.llm.lora import adapter_shapes, adapters
    from nemo_mtbi.llm.weights import load_shares

    shapes = adapter_shapes(chunks[0].architecture, chunks[0].lora.config)
    load_shares(adapters(chunks).items(), Drawn(shapes))
