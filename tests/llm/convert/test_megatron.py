# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints: Megatron loads ours, and we read what any layout has saved."""

import os
import re
from unittest import mock

import pytest
import torch
from hf_models import hf_llm

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.convert.hf import HFWeights
from nemo_mtbi.llm.convert.megatron import MegatronWeights, write_megatron

LAYOUTS = {"single": ParallelConfig(), "tp2": ParallelConfig(2), "pp2": ParallelConfig(1, 2)}


def whole(source, name):
    return source.rows(name, 0, 0, source.shape(name)[0])


def same(one, other):
    assert set(one.names()) == set(other.names())
    for name in one.names():
        assert one.shape(name) == other.shape(name), name
        assert torch.equal(whole(one, name), whole(other, name)), name


@pytest.fixture(scope="module", params=["dense", "experts"])
def folder(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("llm")
    if request.param == "dense":
        hf_llm(folder / "hf", tie_word_embeddings=True, vocab_size=509)  # Megatron pads it at TP 2
    else:
        experts = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
        hf_llm(folder / "hf", "qwen3_moe", vocab_size=509, head_dim=16, **experts)
    source = HFWeights(folder / "hf")
    write(folder / "megatron", source, shard_bytes=100_000)
    return folder


def write(path, source, weights=None, **settings):
    architecture = source.architecture
    write_megatron(path, weights or source, architecture.num_layers, architecture.num_experts, **settings)


def with_the_norms_of_transformer_engine(state):
    """Megatron's local layers name the norm of a router as if it were fused with the layer behind it."""
    for value in state.values():
        if ".mlp.router." in "".join(state) and hasattr(value, "key"):
            value.key = value.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    return state


@pytest.fixture(scope="module")
def source(folder):
    return HFWeights(folder / "hf")


def test_what_is_written_is_read(folder, source):
    stored = MegatronWeights(folder / "megatron", source.architecture.vocab_size)
    same(stored, source)
    assert len(list((folder / "megatron").glob("*.distcp"))) > 3
    expert = "experts.local_experts.1." if source.architecture.num_experts else ""
    name = f"decoder.layers.2.mlp.{expert}linear_fc1.weight"
    for axis, start, stop in ((0, 5, 57), (0, 63, 64), (1, 3, 9)):
        assert torch.equal(stored.rows(name, axis, start, stop), whole(source, name).narrow(axis, start, stop - start))


def own_loader(folder, layout):
    """Worker: Megatron's own loader takes what we have written, at any layout."""
    from megatron.core import dist_checkpointing

    from nemo_mtbi.llm.decoder import build_decoder
    from nemo_mtbi.llm.weights import load_weights, named_weights
    from nemo_mtbi.parallel import groups

    groups.initialize(LAYOUTS[layout])
    source = HFWeights(f"{folder}/hf")
    theirs, ours = build_decoder(source.architecture)[0], build_decoder(source.architecture)[0]
    load_weights([ours], source)
    wanted = with_the_norms_of_transformer_engine(theirs.sharded_state_dict())
    theirs.load_state_dict(dist_checkpointing.load(wanted, f"{folder}/megatron"), strict=False)
    expected = dict(named_weights(ours))
    assert expected
    for name, value in named_weights(theirs):
        assert torch.equal(value, expected[name]), f"{layout}: {name}"


def own_writer(folder, layout):
    """Worker: we read what Megatron has written at a layout."""
    from megatron.core import dist_checkpointing

    from nemo_mtbi.llm.decoder import build_decoder
    from nemo_mtbi.llm.weights import load_weights
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.parallel.cpu import megatron_device

    groups.initialize(LAYOUTS[layout])
    source = HFWeights(f"{folder}/hf")
    (decoder,) = build_decoder(source.architecture)
    load_weights([decoder], source)
    out = f"{folder}/by-megatron-{layout}"
    if torch.distributed.get_rank() == 0:
        os.mkdir(out)
    torch.distributed.barrier()
    prefixed = {f"module.{key}": value for key, value in decoder.sharded_state_dict(prefix="module.").items()}
    with mock.patch("torch.cuda.synchronize"), megatron_device(torch.device("cpu")):  # its writer asks for CUDA
        dist_checkpointing.save({"model": prefixed}, out)
    same(MegatronWeights(out, source.architecture.vocab_size), source)


def test_megatron_loads_it(folder):
    own_loader(folder, "single")


def test_what_megatron_has_written_is_read(folder):
    own_writer(folder, "single")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_megatron_loads_and_writes_in_parallel(folder, layout, processes):
    processes(own_loader, folder, layout, count=2)
    processes(own_writer, folder, layout, count=2)


@pytest.mark.parametrize("form", ["layers", "layers and experts"])
def test_layers_and_experts_may_stand_apart(folder, source, tmp_path, form):
    """As Megatron writes them where layers differ, or with ``singleton_local_shards``."""
    import torch.distributed.checkpoint as checkpoint

    state: dict[str, torch.Tensor] = {}
    for name in source.names():
        match = re.fullmatch(r"(decoder\.layers\.\d+\.mlp\.experts\.)local_experts\.(\d+)(\..*)", name)
        if not match:
            state[name] = whole(source, name)
        elif form == "layers":
            state.setdefault(f"{match[1]}experts{match[3]}", []).append(whole(source, name))
        else:
            state[f"{match[1]}experts.{match[2]}{match[3]}"] = whole(source, name)
    state = {name: torch.stack(value) if isinstance(value, list) else value for name, value in state.items()}
    checkpoint.save(state, checkpoint_id=tmp_path / "apart", no_dist=True)
    same(MegatronWeights(tmp_path / "apart", source.architecture.vocab_size), source)


def test_a_killed_run_leaves_nothing_in_the_way(folder, source, tmp_path):
    class Broken:
        names, shape = source.names, source.shape
        left = 30

        def rows(self, *place):
            self.left -= 1
            if self.left < 0:
                raise OSError("disk full")
            return source.rows(*place)

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "out", source, Broken())
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out", source)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="out is there: give a new folder"):
        write(tmp_path / "out", source)


def test_what_is_no_checkpoint_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is not a distributed checkpoint"):
        MegatronWeights(tmp_path, 509)
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="holds os.system, which no checkpoint has"):
        MegatronWeights(tmp_path, 509)
    (tmp_path / ".metadata").write_bytes((folder / "megatron" / ".metadata").read_bytes())
    with pytest.raises(ValueError, match="is damaged: .* can't be read"):
        whole(MegatronWeights(tmp_path, 509), "decoder.final_layernorm.weight")
