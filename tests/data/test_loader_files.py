# SPDX-License-Identifier: Apache-2.0
"""The loader with corpora as people have them: text files of every editor, small corpora, channels and codecs."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import loader_sources as sources
import numpy as np
import pytest
import soundfile
from lhotse import Recording
from lhotse.utils import fastcopy

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.data.loader import build_dataloader
from nemo_mtbi.prepare.export import export

HERE = Path(__file__)
talk = SimpleNamespace(**runpy.run_path(str(HERE.with_name("test_conversations.py"))))
MARK, ODD = b"\xef\xbb\xbf", "one\u2028two\x85three"


@pytest.fixture
def dataset(chat, frames):
    several = ChatFormat(chat.turn, chat.end, chat.tokenizer, more=("<user>", "{audio}", "|", "{prompt}"))
    return sources.make_dataset(several, frames)


def rewrite(path):
    """The file as an editor on Windows saves it, with empty lines at its end."""
    lines = [json.dumps(json.loads(line), ensure_ascii=False) for line in Path(path).read_text().splitlines()]
    Path(path).write_bytes(MARK + "".join(line + "\r\n" for line in [*lines, "", " "]).encode())


def plain_cuts(corpus, cuts):
    path = corpus.folder / "cuts.jsonl"
    path.write_text("".join(json.dumps(cut.to_dict()) + "\n" for cut in cuts))
    return {"cuts_path": str(path)}


FORMS = {
    "cuts": plain_cuts,
    "NeMo manifest": lambda corpus, cuts: {"manifest_filepath": corpus.manifest(cuts)},
    "tarred": sources.tarred,
}


@pytest.mark.parametrize("form", FORMS)
def test_manifests_of_every_editor_train_alike(corpus, dataset, form):
    cuts = corpus.cuts(2, seconds=0.6)
    for cut in cuts:
        cut.custom["behaviors"][0]["response"] = cut.supervisions[0].text = ODD
        cut.supervisions[0].alignment = None
    source = FORMS[form](corpus, cuts)
    config = {**sources.PLAIN, "batch_size": 2}
    (before,) = build_dataloader({**config, **source}, dataset, train=False)
    rewrite(source.get("cuts_path") or source["manifest_filepath"])
    (after,) = build_dataloader({**config, **source}, dataset, train=False)
    assert sources.content(after) == sources.content(before)
    assert after.rows[0].reference == ODD and len(after.cut_ids) == 2


@pytest.mark.parametrize("layout", ["multimodal", "sharegpt"])
def test_conversations_of_every_editor_train_alike(corpus, dataset, layout):
    entry = getattr(talk, layout)(corpus, [cut.recording.sources[0].source for cut in corpus.cuts(2)])
    (before,) = talk.read(dataset, entry)
    rewrite(entry["manifest_filepath"])
    (after,) = talk.read(dataset, entry)
    assert sources.content(after) == sources.content(before)


def test_a_blend_with_a_byte_order_mark(corpus, dataset):
    source = sources.as_file(corpus, corpus.cuts(4))
    path = Path(source["input_cfg"])
    path.write_bytes(MARK + path.read_bytes())
    assert len(next(iter(build_dataloader({**sources.PLAIN, **source}, dataset))).cut_ids) == 4
    for content, message in (
        (b"\xff\xfe", "UTF-16"),
        (b"- {a: [", "must be a YAML list of sources"),
        (b"", "list of"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            build_dataloader({**sources.PLAIN, **source}, dataset)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("key", ["cuts_path", "manifest_filepath"])
def test_files_that_are_no_manifests_are_named_with_their_key(corpus, dataset, key):
    good = {"cuts_path": corpus.jsonl(corpus.cuts(1)), "manifest_filepath": corpus.manifest(corpus.cuts(1))}
    (corpus.folder / "latin.jsonl").write_bytes('{"text": "où"}\n'.encode("latin-1"))
    (corpus.folder / "empty.jsonl").write_bytes(MARK + b"\r\n")
    other = next(path for name, path in good.items() if name != key)
    for path, message in (
        (str(corpus.folder), "is a folder"),
        (str(corpus.folder / "empty.jsonl"), "it is empty"),
        (other, "is a NeMo manifest|is a Lhotse cut"),
    ):
        for source in ({key: path}, {"input_cfg": [{"type": "lhotse" if key == "cuts_path" else "nemo", key: path}]}):
            with pytest.raises(ValueError, match=f"{key}=.*{message}"):
                build_dataloader({**sources.PLAIN, **source}, dataset)
    with pytest.raises(ValueError, match="line 1 of .*latin.jsonl is not UTF-8 .*iconv"):
        build_dataloader({**sources.PLAIN, key: str(corpus.folder / "latin.jsonl")}, dataset)


def test_pieces_with_a_rate_train_as_those_without(corpus, dataset):
    """NeMo, which then does not open the file, takes its length to be that of the piece."""
    cuts = corpus.cuts(3, seconds=3.0, text="a b c d")
    for cut, seconds in zip(cuts, (0.5, 1.0, 2.0), strict=True):
        cut.duration, cut.supervisions[0].alignment = seconds, None
    found = []
    for extra in ({}, {"sampling_rate": 16000}):
        config = {**sources.PLAIN, "manifest_filepath": corpus.manifest(cuts, "m", offset=1.0, **extra)}
        (batch,) = build_dataloader({**config, "batch_size": 3}, dataset, train=False)
        found.append((batch.audio.numpy(), [micro.layout.numpy() for micro in batch.microbatches]))
    assert [len(layouts) for _, layouts in found] == [len(found[0][1])] * 2
    assert np.array_equal(found[0][0], found[1][0]) and (found[0][0] != 0).sum(1).max() == 32000
    assert all(np.array_equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("rate", [{}, {"sampling_rate": 16000}])
def test_pieces_that_go_past_their_file_are_bad_audio(corpus, dataset, rate):
    cuts = corpus.cuts(2, seconds=3.0, text="a b c d")
    for cut, seconds in zip(cuts, (1.0, 3.0), strict=True):
        cut.duration, cut.supervisions[0].alignment = seconds, None
    config = {**sources.PLAIN, "manifest_filepath": corpus.manifest(cuts, "m", offset=1.0, **rate)}
    with pytest.raises(ValueError, match="cut .*cut-001.* cannot be read"):
        list(build_dataloader(config, dataset, train=False))
    dataset.on_bad_audio = "skip"
    (batch,) = build_dataloader(config, dataset, train=False)
    assert batch.skipped == {"unreadable": 1} and len({row.cut_id for row in batch.rows}) == 1


# Small corpora ------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("kind", ["one cut", "two cuts", "equal costs", "fewer than buckets"])
def test_small_corpora_train_under_default_buckets(corpus, dataset, kind, replicas):
    count = {"one cut": 1, "two cuts": 2, "equal costs": 12, "fewer than buckets": 3}[kind]
    cuts = corpus.cuts(count)
    if kind == "equal costs":
        cuts = [fastcopy(cuts[0], id=f"c{number}") for number in range(count)]
    config = {"cuts_path": corpus.jsonl(cuts), "batch_tokens": 3000, "use_bucketing": True}
    config |= {"shuffle": True, "seed": 1}
    loaders = [build_dataloader(config, dataset, rank=rank, world_size=replicas) for rank in range(replicas)]
    for _ in range(2):
        batches = [list(loader) for loader in loaders]
        assert len({len(of_one) for of_one in batches}) == 1  # or one replica would wait for ever
        assert {cut for of_one in batches for batch in of_one for cut in (row.cut_id for row in batch.rows)} == {
            cut.id for cut in cuts
        }


def test_equal_costs_are_shuffled_although_they_make_one_bucket(corpus, dataset):
    cuts = [fastcopy(cut, id=f"c{number:02d}") for number, cut in enumerate(corpus.cuts(1) * 20)]
    config = {"cuts_path": corpus.jsonl(cuts), "batch_size": 20, "use_bucketing": True, "seed": 1}
    batches = [next(iter(build_dataloader({**config, "shuffle": shuffle}, dataset))) for shuffle in (True, False)]
    orders = [list(dict.fromkeys(row.cut_id for row in batch.rows)) for batch in batches]
    assert orders[1] == [cut.id for cut in cuts] and orders[0] != orders[1] and sorted(orders[0]) == orders[1]


def test_buckets_without_bounds_are_refused(corpus, dataset):
    config = {"cuts_path": corpus.jsonl(corpus.cuts(1)), "batch_size": 1, "bucket_duration_bins": []}
    with pytest.raises(ValueError, match="bucket_duration_bins is empty, .*use_bucketing=false"):
        build_dataloader(config, dataset)


# Channels and codecs ------------------------------------------------------------

CODECS = {
    "wav": ("wav", {"format": "WAV", "subtype": "PCM_16"}, 16000),
    "24 bits": ("wav", {"format": "WAV", "subtype": "PCM_24"}, 44100),
    "float": ("WAV", {"format": "WAV", "subtype": "FLOAT"}, 8000),
    "flac": ("flac", {"format": "FLAC"}, 16000),
    "vorbis": ("ogg", {"format": "OGG", "subtype": "VORBIS"}, 44100),
    "opus": ("opus", {"format": "OGG", "subtype": "OPUS"}, 16000),
    "mp3": ("mp3", {"format": "MP3"}, 16000),
}


def stereo(corpus, codec):
    """A file with noise in one channel, and a quarter of it and other noise in the other; [N] is their mean."""
    suffix, form, rate = CODECS[codec]
    seconds = np.arange(rate * 2) / rate
    left, right = 0.4 * np.sin(2 * np.pi * 300 * seconds), 0.2 * np.sin(2 * np.pi * 700 * seconds)
    path = corpus.folder / f"stereo.{suffix}"
    soundfile.write(path, np.stack([left, right], axis=1), rate, **form)
    mono = corpus.folder / "mono.wav"
    soundfile.write(mono, (left + right) / 2, rate, subtype="FLOAT")
    return path, mono, rate


@pytest.mark.parametrize("codec", CODECS)
def test_channels_are_averaged_in_every_codec_and_layout(corpus, dataset, codec, tmp_path):
    path, mono, rate = stereo(corpus, codec)

    def cut(file):
        made, recording = corpus.cut(0, seconds=2.0), Recording.from_file(file, recording_id="cut-000")
        return fastcopy(recording.to_cut(), id="cut-000", supervisions=made.supervisions, custom=made.custom)

    def heard(source):
        (batch,) = build_dataloader({**sources.PLAIN, **source}, dataset, train=False)
        return batch.audio[0].numpy()

    expected = heard({"cuts_path": corpus.jsonl([cut(mono)])})
    both = cut(path)
    assert both.num_channels == 2
    layouts = {
        "cuts": {"cuts_path": corpus.jsonl([both])},
        "manifest": {"manifest_filepath": corpus.manifest([both], "m")},
        "manifest with a rate": {"manifest_filepath": corpus.manifest([both], "r", sampling_rate=rate)},
        "shar": {"input_cfg": [export([both], tmp_path / "shar", "shar", 5)]},
        "tarred": {"input_cfg": [export([both], tmp_path / "tarred", "tarred", 5)]},
    }
    loss = 0.05 if codec in ("vorbis", "opus", "mp3") else 1e-3  # of codecs that drop something
    for name, source in layouts.items():
        found = heard(source)
        short = min(len(found), len(expected)) - 800
        assert abs(len(found) - len(expected)) < 800, name
        assert np.abs(found[800:short] - expected[800:short]).mean() < loss, name
    noisy = {"noise_path": corpus.jsonl([corpus.cut(1, seconds=3.0)], "noise"), "noise_mix_prob": 1.0}
    assert len(heard({**layouts["cuts"], **noisy})) == len(heard(layouts["cuts"]))
