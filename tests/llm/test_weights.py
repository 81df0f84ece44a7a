# SPDX-License-Identifier: Apache-2.0
"""Weights that were split over processes come back as the file they were read from."""

import pytest
import torch
from matrix import with_core
from safetensors.torch import load_file

from nemo_mtbi.config.parallel import ParallelConfig

LAYOUTS = {  # name: layout and data-parallel size
    "one": (ParallelConfig(), 1),
    "tp2": (ParallelConfig(2), 1),
    "pp2": (ParallelConfig(1, 2), 1),
    "pp2_vp2": (ParallelConfig(1, 2, 2), 1),
    "tp2_pp2": (ParallelConfig(2, 2), 1),
    "tp2_dp2": (ParallelConfig(2), 2),
}
MODELS = {
    "tied": dict(tie_embeddings=True),
    "untied": dict(tie_embeddings=False),
    "tied_129": dict(tie_embeddings=True, vocab_size=129),  # a number of rows that two processes can't share evenly
    "untied_129": dict(tie_embeddings=False, vocab_size=129, qk_layernorm=True, add_qkv_bias=True),
}


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    """A folder with text LLMs of four layers."""
    from nemo_mtbi.testing import tiny_text_llm

    folder = tmp_path_factory.mktemp("llms")
    for name, changes in MODELS.items():
        tiny_text_llm(folder / name, num_layers=4, **changes)
    return folder


def gather(folder, layout):
    """Worker: loads each LLM under a layout and gathers it again."""
    from nemo_mtbi.archive.save_restore import llm_specs
    from nemo_mtbi.llm.weights import gather_weights
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.speech_llm.pretrained import load_text_llm

    groups.initialize(LAYOUTS[layout][0])
    for model in MODELS:
        stored = load_file(f"{folder}/{model}/model.safetensors")
        for dtype in (torch.float32, torch.bfloat16):
            chunks = load_text_llm(f"{folder}/{model}", dtype).chunks
            specs = llm_specs(chunks)
            assert {name: spec.shape for name, spec in specs.items()} == {n: tuple(v.shape) for n, v in stored.items()}
            # stored in float16: nothing is lost when it is stored so again; bfloat16 has rounded it
            assert {spec.dtype for spec in specs.values()} == {torch.float16 if dtype == torch.float32 else dtype}
            found = list(gather_weights(chunks))
            assert [name for name, _ in found] == sorted(stored) == list(specs)
            if groups.control_group("replica").rank() > 0:
                assert all(value is None for _, value in found)
                continue
            for name, value in found:
                assert value.dtype == dtype and torch.equal(value, stored[name].to(dtype)), f"{model} {name}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", with_core(LAYOUTS, ["one", "tp2", "pp2_vp2", "tp2_pp2"]))
def test_gathered_weights_are_those_of_the_file(layout, llms, processes):
    config, data_size = LAYOUTS[layout]
    processes(gather, llms, layout, count=config.model_parallel_size * data_size, timeout=150)
