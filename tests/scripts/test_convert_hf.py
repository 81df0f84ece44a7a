# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import hf_llm
from safetensors.torch import load_file

import nemo_mtbi
from nemo_mtbi.llm.directory import MEGATRON, HFDirectory, OwnDirectory
from nemo_mtbi.parallel import groups
from nemo_mtbi.speech_llm.pretrained import find_text_llm, load_text_llm

ROOT = Path(nemo_mtbi.__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "convert_hf.py"
_spec = importlib.util.spec_from_file_location("convert_hf", SCRIPT)
convert_hf = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(convert_hf)
FAMILIES = {"llama": "brackets", "mistral": "brackets", "qwen2": "chatml", "qwen3": "chatml", "qwen3_moe": "chatml"}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


def tensors(path):
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("family, style", FAMILIES.items())
def test_there_and_back_is_bitwise_equal(folder, family, style, capsys):
    experts = EXPERTS if family == "qwen3_moe" else {}
    hf = hf_llm(folder / family, family, style, tie_word_embeddings=family == "qwen3", **experts)
    ours, again = folder / f"{family}-ours", folder / f"{family}-again"
    assert convert_hf.main(["to-megatron", str(hf), str(ours)]) == 0
    assert f"train with model.pretrained_llm={ours}" in capsys.readouterr().out
    assert convert_hf.main(["to-hf", str(ours), str(again), "--shard-gb", "0.0001"]) == 0
    before, after = tensors(hf), tensors(again)
    assert before.keys() == after.keys() and len(list(again.glob("*.safetensors"))) > 1
    for name, value in before.items():
        assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name
    assert contents(again) == contents(hf)


def contents(path):
    """Everything but the weights."""
    found = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if ".safetensors" not in name.name}


def test_what_came_with_an_llm_comes_back(tmp_path):
    """How it generates, its templates and its licence; no code and no weights of another form."""
    hf = hf_llm(tmp_path / "hf")
    ends = {"eos_token_id": [2, 0], "temperature": 0.6}
    (hf / "generation_config.json").write_text(json.dumps(ends))
    (hf / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tools.jinja", "LICENSE", "README.md", "chat_template.json"):
        (hf / name).write_text(name if not name.endswith("json") else "{}")
    expected = contents(hf)
    (hf / "modeling.py").write_text("raise SystemExit('this code was run')")
    (hf / "pytorch_model.bin").write_bytes(b"x")
    for command, source, out in (("to-megatron", "hf", "ours"), ("to-hf", "ours", "again")):
        assert convert_hf.main([command, str(tmp_path / source), str(tmp_path / out)]) == 0
    assert contents(tmp_path / "again") == expected
    chats = [find_text_llm(tmp_path / name).chat() for name in ("hf", "ours", "again")]
    assert [chat.end_ids for chat in chats] == [(2, 0)] * 3
    assert len({chat.fingerprint() for chat in chats}) == 1


@torch.no_grad()
def test_an_llm_that_was_made_here_goes_to_hugging_face(tmp_path):
    """It has no config.json, and leaves the channels of a head to be computed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_mtbi.speech_llm.pretrained import DEMO

    groups.initialize()
    assert convert_hf.main(["to-hf", str(DEMO / "llm"), str(tmp_path / "hf")]) == 0
    ours, ids = load_text_llm("demo"), [1, 50, 60, 5, 70, 6]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float().eval()(torch.tensor([ids])).logits[0]
    hidden = ours.decoder.hidden(ours.decoder.embed_tokens(torch.tensor([ids])).transpose(0, 1))
    found = ours.decoder.logits(hidden, torch.arange(len(ids)))
    assert torch.allclose(found, theirs, atol=1e-3)
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path / "hf"), "translate into spanish"
    assert tokenizer.encode(text, add_special_tokens=False) == ours.chat.encode(text)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["head_dim"], config["eos_token_id"]) == (32, ours.chat.end_id)
    assert (
        convert_hf.main(
            ["to-hf", str(DEMO / "llm"), str(tmp_path / "same"), "--config", str(tmp_path / "hf" / "config.json")]
        )
        == 0
    )
    assert contents(tmp_path / "same") == contents(tmp_path / "hf")


@torch.no_grad()
def test_hugging_face_loads_what_came_back(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([[3, 4, 5, 6]])
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder / name).eval()(ids).logits for name in ("qwen2", "qwen2-again")
    )
    assert torch.equal(before, after)
    assert AutoTokenizer.from_pretrained(folder / "qwen2-again").encode("the fox")


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_converted_it_is_the_same_llm(folder, family):
    groups.initialize()
    theirs, ours = (find_text_llm(folder / name) for name in (family, f"{family}-ours"))
    assert isinstance(theirs, HFDirectory) and isinstance(ours, OwnDirectory)
    theirs, ours = load_text_llm(theirs), load_text_llm(ours)
    assert ours.chat.fingerprint() == theirs.chat.fingerprint()
    expected = dict(theirs.decoder.named_parameters())
    for name, value in ours.decoder.named_parameters():
        assert torch.equal(value, expected[name]), name


def test_the_fingerprint_of_a_checkpoint_tells_its_weights(folder, tmp_path):
    copy = shutil.copytree(folder / "qwen2-ours", tmp_path / "copy")
    same = find_text_llm(copy).fingerprint
    assert same == find_text_llm(folder / "qwen2-ours").fingerprint
    file = next((copy / MEGATRON).glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert find_text_llm(copy).fingerprint != same


@pytest.mark.slow
@pytest.mark.full
def test_an_llm_passes_through_little_memory(tmp_path):
    """Peak memory stays below two of the largest shards and one that is written, beside the imports."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 8}
    hf = hf_llm(tmp_path / "hf", "qwen2", shard="40MB", **sizes)
    shards = sorted(path.stat().st_size for path in hf.glob("*.safetensors"))
    assert len(shards) > 4 and sum(shards) > 4 * shards[-1]
    hf_llm(tmp_path / "tiny", "qwen2")

    def peak(*arguments):
        out = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True)
        return float(re.search(r"peak memory ([\d.]+) GiB", out.stdout)[1]) * 2**30

    bound = 2 * shards[-1] + 40e6
    for command, name in (("to-megatron", "hf"), ("to-hf", "hf-ours")):
        out = "-ours" if command == "to-megatron" else "-again"
        alone = peak(command, str(tmp_path / name.replace("hf", "tiny")), str(tmp_path / f"tiny{out}"))
        found = peak(command, str(tmp_path / name), str(tmp_path / f"hf{out}"), "--shard-gb", "0.04")
        assert found - alone < bound, (command, (found - alone) / 1e6, bound / 1e6)


def test_errors_say_what_to_do(folder, tmp_path, capsys):
    for arguments, message in (
        (["to-megatron", str(tmp_path), "x"], "lacks config.json, model.safetensors, tokenizer.json"),
        (["to-megatron", str(folder / "qwen2"), str(folder / "llama")], "is there: give a new folder"),
        (["to-hf", str(folder / "qwen2"), str(tmp_path / "x")], "lacks llm.yaml"),
        (
            ["to-hf", str(folder / "qwen2-ours"), str(tmp_path / "x"), "--config", str(folder / "llama/config.json")],
            "describes another LLM",
        ),
    ):
        assert convert_hf.main(arguments) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert_hf.main(["to-hf", "a", "b", "--shard-gb", "0"])
