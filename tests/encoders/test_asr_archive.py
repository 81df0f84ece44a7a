# SPDX-License-Identifier: Apache-2.0
"""ASR archives of others: what is refused before anything is built, and what NeMo is given."""

import io
import os
import zipfile

import pytest
import torch
import yaml
from nemo.collections.asr.models import EncDecHybridRNNTCTCBPEModel, EncDecRNNTBPEModel
from nemo_models import LETTERS, characters, transducer
from tar_tricks import repacked

from nemo_mtbi.encoders.asr_archive import AsrFile
from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.planning.footprint import read_encoder_settings
from nemo_mtbi.speech_llm.pretrained import load_asr_model, load_speech_encoder
from nemo_mtbi.testing import tiny_asr_nemo

CONFIG, PICKLED = "model_config.yaml", "model_weights.ckpt"
TOKENIZER = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
MODULES = "nemo.collections.asr.modules"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return tiny_asr_nemo(tmp_path_factory.mktemp("asr") / "asr.nemo")


@pytest.fixture
def refused(archive, tmp_path):
    """``refused(change, message)``: however the archive is opened, it is refused after ``change``."""

    def check(
        change, message, ways=(load_speech_encoder, load_asr_model, lambda path: read_encoder_settings(str(path)))
    ):
        path = repacked(archive, tmp_path / "crafted.nemo", change)
        for way in ways:
            with pytest.raises(ValueError, match=rf"crafted.nemo is not a readable NeMo ASR checkpoint \(.*{message}"):
                way(path)

    return check


def config(change):
    """A change of the configuration."""

    def edit(files):
        values = yaml.safe_load(files[CONFIG])
        change(values)
        files[CONFIG] = yaml.safe_dump(values, sort_keys=False).encode()

    return edit


def put(*place, value):
    """A value at a place of the configuration."""

    def edit(values):
        for key in place[:-1]:
            values = values.setdefault(key, {}) if isinstance(values, dict) else values[key]
        values[place[-1]] = value

    return config(edit)


FOREIGN = {"_target_": TOKENIZER, "pretrained_model_name": "evil", "trust_remote_code": True}


@pytest.mark.parametrize(
    "place",
    [
        ("preprocessor",),
        ("encoder", "junk"),
        ("encoder", "att_context_size"),
        ("decoder",),
        ("decoder", "vocabulary"),
        ("joint", "jointnet", "deep"),
        ("train_ds", "augmentor"),
        ("tokenizer", "custom_tokenizer"),
        ("spec_augment",),
    ],
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, [x]], lambda x: {"_args_": [x], "_target_": MODULES}])
def test_foreign_code_is_refused_at_every_depth(refused, place, wrap):
    refused(put(*place, value=wrap(FOREIGN)), "(foreign code at|names the class|could call other code)")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "nemo.collections.asr.parts.utils.vad_utils.os.system",
        "nemo.collections.asr.parts.utils.vad_utils.subprocess.Popen",
        "nemo.collections.asr.modules.conformer_encoder.torch.load",
        "nemo.collections.asr.models.ASRModel.restore_from",
        "nemo.collections.asr.models.ASRModel.from_pretrained",
        "nemo.core.classes.ModelPT",
        "nemo.utils.model_utils.import_class_by_path",
        "torch.optim.os.system",
        "torch.hub.load",
        "nemo_mtbi.io.atomic.os.system",
        ["os.system"],
        {"a": 1},
    ],
)
@pytest.mark.parametrize("place", [("encoder", "_target_"), ("other", "_target_"), ("loss", "a", "_target_")])
def test_other_classes_are_refused(refused, target, place):
    refused(put(*place, value=target), "names the class")


@pytest.mark.parametrize(
    "target", [f"{MODULES}.HuggingFaceEncoderModule", f"{MODULES}.RNNTDecoder", f"{MODULES}.os", f"{MODULES}.Nothing"]
)
def test_modules_that_are_no_encoder_are_not_built(refused, target):
    refused(put("encoder", "_target_", value=target), "its encoder is|names the class")


@pytest.mark.parametrize("key", ["_partial_", "_convert_", "_recursive_", "target", "cls"])
def test_keys_of_hydra_are_refused_in_what_is_built(refused, key):
    refused(put("encoder", key, value=True), f"its encoder has {key}, which could call other code")


def test_references_are_refused_however_they_are_written(refused, monkeypatch):
    monkeypatch.setenv("MTBI_SECRET", "1")

    def plant(files):
        files[CONFIG] += b'note: ["\\x24{oc.env:MTBI_SECRET}"]\n'

    refused(plant, "refers to values outside of it")


@pytest.mark.parametrize("name", ["evil.py", "sitecustomize.py", "other/model_config.yaml", "model_weights.bin"])
def test_unknown_members_are_refused(refused, name):
    refused(
        lambda files: files.update({name: b"import os"}), f"it holds {name}, which model_config.yaml does not name"
    )


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("encoder", "d_model"), 2**20, "weights do not fit its settings"),
        (("encoder", "n_layers"), 2**40, "describes .* layers, more than"),
        (("encoder", "n_layers"), "many", "describes many layers"),
        (("encoder", "n_layers"), 2, "weights do not fit its settings"),
        (("encoder", "pos_emb_max_len"), 10**9, "describes tables of .* numbers beside the weights"),
        (("encoder", "conv_kernel_size"), 2**61 + 1, "weights do not fit|does not describe an encoder"),
        (("encoder", "n_heads"), 0, "does not describe an encoder|do not fit"),
        (("preprocessor", "features"), 10**9, "features is 1000000000, more than 1024"),
        (("preprocessor", "n_fft"), 2**40, "n_fft is"),
        (("preprocessor", "window_size"), 1e12, "window_size is"),
        (("preprocessor", "window_stride"), float("nan"), "window_stride is nan"),
        (("sample_rate",), 2**40, "has the sample_rate"),
        (("sample_rate",), "16k", "has the sample_rate '16k'"),
    ],
)
def test_sizes_are_compared_before_memory_is_taken(refused, place, value, message):
    refused(put(*place, value=value), message, (load_speech_encoder, load_asr_model))


def test_pickles_and_packed_weights_are_not_read(refused, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    content = io.BytesIO()
    torch.save({"a": Evil()}, content)
    ways = (load_speech_encoder, load_asr_model)
    refused(lambda files: files.update({PICKLED: content.getvalue()}), "holds more than tensors", ways)
    torch.save([torch.zeros(1)], content := io.BytesIO())
    refused(lambda files: files.update({PICKLED: content.getvalue()}), "holds more than named tensors", ways)

    def pack(files):
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(files[PICKLED])) as old, zipfile.ZipFile(packed, "w", 8) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        files[PICKLED] = packed.getvalue()

    refused(pack, "is packed, as torch packs nothing", ways)
    refused(lambda files: files.update({PICKLED: b"\x80\x04."}), "is damaged", ways)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "section, message",
    [
        ({"type": "wpe", "dir": "/etc"}, "tokenizer is of type wpe, and only bpe"),
        ({"type": "bpe", "dir": "/etc", "model_path": "/etc/passwd"}, "lacks passwd, a file of its tokenizer"),
        ({"type": "bpe", "model_path": "nemo:../../x.model"}, "lacks x.model"),
        ({"type": "agg", "langs": {"en": {"type": "wpe"}}}, "type wpe"),
        ({"type": "agg", "langs": {"en": {"type": "agg", "langs": {}}}}, "tokenizers hold tokenizers"),
        (None, "tokenizer is of type nothing"),
    ],
)
def test_tokenizers_are_files_of_the_archive(archive, tmp_path, section, message):
    def change(files):
        names = [name for name in files if "tokenizer" in name or "vocab" in name]
        put("tokenizer", value=section)(files)
        put("names", value=[f"nemo:{name}" for name in names])(files)

    path = repacked(archive, tmp_path / "crafted.nemo", change)
    with pytest.raises(ValueError, match=message):
        load_asr_model(path)


def test_what_nemo_is_given_is_written_anew(archive, tmp_path):
    """Sections that a CTC model does not need are not passed on, and neither are paths."""

    def change(files):
        for key in ("train_ds", "optim", "init_from_nemo_model", "pretrained_model", "decoding"):
            put(key, value={"manifest_filepath": "/etc/passwd"})(files)
        put("tokenizer", "dir", value="/etc")(files)

    found = load_asr_model(repacked(archive, tmp_path / "crafted.nemo", change))
    wanted = load_asr_model(archive)
    for key in ("train_ds", "optim", "init_from_nemo_model", "pretrained_model"):
        assert key not in found.cfg
    assert found.cfg.tokenizer.dir is None and "manifest_filepath" not in str(found.cfg)
    for name, value in found.state_dict().items():
        assert torch.equal(value, wanted.state_dict()[name])


@pytest.mark.parametrize("kind", ["hybrid", "characters"])
def test_ctc_models_of_every_kind_give_the_same_log_probabilities(kind, tmp_path):
    model = characters() if kind == "characters" else transducer(EncDecHybridRNNTCTCBPEModel, tmp_path / "tokenizer")
    model.save_to(str(tmp_path / "asr.nemo"))
    found = load_asr_model(tmp_path / "asr.nemo")
    audio, lengths = torch.randn(1, 16_000), torch.tensor([16_000])
    with torch.no_grad():
        encoded, _ = model(input_signal=audio, input_signal_length=lengths)[:2] if kind == "hybrid" else (None, None)
        wanted = model.ctc_decoder(encoder_output=encoded) if kind == "hybrid" else None
        if kind == "characters":
            wanted = model(input_signal=audio, input_signal_length=lengths)[0]
            assert list(found.decoder.vocabulary) == LETTERS
        log_probs = found.eval()(input_signal=audio, input_signal_length=lengths)[0]
    torch.testing.assert_close(log_probs, wanted)


def test_models_without_a_ctc_head_are_named(tmp_path):
    transducer(EncDecRNNTBPEModel, tmp_path / "tokenizer").save_to(str(tmp_path / "rnnt.nemo"))
    with pytest.raises(ValueError, match="its EncDecRNNTBPEModel has no CTC head; give a CTC or a hybrid model"):
        load_asr_model(tmp_path / "rnnt.nemo")
    assert load_speech_encoder(tmp_path / "rnnt.nemo").shape.size == 16


def test_an_archive_is_read_in_place(archive, monkeypatch):
    import tarfile

    monkeypatch.setattr(tarfile.TarFile, "extractall", None)
    monkeypatch.setattr(tarfile.TarFile, "extract", None)
    assert load_speech_encoder(archive).shape.size == 16
    with pytest.raises(ArchiveError, match="it does not exist"):
        AsrFile(archive.with_name("nowhere.nemo"))
