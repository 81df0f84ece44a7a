# SPDX-License-Identifier: Apache-2.0
"""What the loader refuses, and how NeMo learns of it."""

import pickle

import loader_sources as sources
import pytest

from nemo_mtbi.data.loader import DATA_TYPE, build_dataloader, read_drawn_rows

PLAIN, content, shar = sources.PLAIN, sources.content, sources.shar


@pytest.fixture
def dataset(chat, frames):
    return sources.make_dataset(chat, frames)


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"batch_tokens": 100}, "batch_size and batch_tokens are both set"),
        ({"batch_size": None}, "no batch size: set batch_tokens"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": None, "batch_duration": 100}, "batch_duration=100 is not supported: .*batch_tokens"),
        ({"batch_siez": 2}, "unknown data key 'batch_siez': did you mean 'batch_size"),
        ({"zzz": 2}, "unknown data key 'zzz': remove it"),
        ({"truncate_duration": 5.0}, "truncate_duration=5.0 is not supported"),
        ({"cut_into_windows_duration": 5.0}, "cut_into_windows_duration"),
        ({"concatenate_samples": True}, "concatenate_samples"),
        ({"seed": "trng"}, "seed must be an integer"),
        ({"shard_seed": "trng"}, "shard_seed='trng' is not supported"),
        ({"concurrent_bucketing": True}, "concurrent_bucketing"),
        ({"sample_rate": 8000}, "the speech encoder takes 16000 Hz"),
        ({"multi_config": True}, "input_cfg and weights"),
        ({"token_equivalent_duration": 0.08}, "follows from the model"),
        ({"bucket_duration_bins": [[1, 2], [3, 4]]}, "two-dimensional"),
        ({"batch_size": None, "bucket_batch_size": [2]}, "needs bucket_duration_bins"),
        ({"rows_per_cut": 0}, "rows_per_cut is 0; it must be at least 1"),
        ({"cuts_path": None}, "no data: set one of input_cfg, cuts_path"),
        ({"cuts_path": None, "input_cfg": []}, "must be a list of sources"),
        ({"cuts_path": None, "input_cfg": [{"type": "lotse"}]}, r"input_cfg\[0\].type is 'lotse'"),
        (
            {"cuts_path": None, "input_cfg": [{"type": "lhotse", "weight": 1}, {"type": "lhotse"}]},
            "give every source a weight",
        ),
        (
            {"cuts_path": None, "input_cfg": [{"type": "lhotse", "shard_seed": "trng"}]},
            r"input_cfg\[0\].shard_seed",
        ),
    ],
)
def test_contradictions_and_unknown_keys_are_errors_with_a_remedy(corpus, dataset, extra, message):
    config = {**PLAIN, "cuts_path": corpus.jsonl(corpus.cuts(1)), **extra}
    with pytest.raises(ValueError, match=message):
        build_dataloader(config, dataset)


@pytest.mark.parametrize(
    "source, key",
    [
        ({"cuts_path": "nowhere.jsonl"}, "cuts_path"),
        ({"manifest_filepath": "nowhere.json"}, "manifest_filepath"),
        ({"manifest_filepath": [["nowhere.json", 2.0]]}, "manifest_filepath"),
        ({"manifest_filepath": "nowhere__OP_0..3_CL_.json"}, "manifest_filepath"),
        ({"shar_path": "nowhere"}, "shar_path"),
        ({"shar_path": {"cuts": ["nowhere.jsonl"]}}, "shar_path"),
        ({"input_cfg": "nowhere.yaml"}, "input_cfg"),
        ({"input_cfg": [{"type": "lhotse", "cuts_path": "nowhere"}]}, r"input_cfg\[0\].cuts_path"),
        (
            {"input_cfg": [{"type": "group", "input_cfg": [{"type": "nemo", "manifest_filepath": "nowhere"}]}]},
            r"input_cfg\[0\].input_cfg\[0\].manifest_filepath",
        ),
    ],
)
def test_a_missing_path_is_named(dataset, source, key):
    with pytest.raises(ValueError, match=f"{key}: there is no 'nowhere"):
        build_dataloader({**PLAIN, **source}, dataset)


def test_a_missing_noise_file_is_named(corpus, dataset):
    with pytest.raises(ValueError, match="noise_path: there is no 'nowhere'"):
        build_dataloader({**PLAIN, "cuts_path": corpus.jsonl(corpus.cuts(1)), "noise_path": "nowhere"}, dataset)


@pytest.mark.parametrize(
    "text, message",
    [
        ("not json\n", "is not JSON"),
        ("", "holds no entries: it is empty"),
        ('{"text": "no audio"}\n', "must have the key audio_filepath"),
        ("\x00\x01\x02", "is not JSON"),
    ],
)
def test_a_manifest_that_is_none_is_one_clear_error(corpus, dataset, text, message):
    path = corpus.folder / "manifest.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"manifest_filepath={path} ?.*{message}"):
        build_dataloader({**PLAIN, "manifest_filepath": str(path)}, dataset)


def test_a_missing_file_in_a_manifest_says_how_to_skip_it(corpus, dataset):
    path = corpus.manifest(corpus.cuts(2))
    (corpus.folder / "cut-000.wav").unlink()
    with pytest.raises(ValueError, match="line 1 of .*cut-000.wav.*set on_bad_audio: skip"):
        build_dataloader({**PLAIN, "manifest_filepath": path}, dataset)


def test_data_without_behaviors_or_of_another_llm_fail_before_training(corpus, dataset):
    path = corpus.jsonl(corpus.cuts(1))
    with pytest.raises(ValueError, match="another llm: sha256:llm, but the model has sha256:x"):
        build_dataloader({**PLAIN, "cuts_path": path}, dataset, expected={"llm": "sha256:x"})
    loader = build_dataloader({**PLAIN, "cuts_path": path}, dataset, expected={"llm": "sha256:x"}, allow_foreign=True)
    assert next(iter(loader)).cut_ids == ["cut-000"]
    bare = corpus.jsonl(corpus.cuts(1, behaviors=False), "bare")
    with pytest.raises(ValueError, match="run examples/mtbi_generate_targets.py"):
        build_dataloader({**PLAIN, "cuts_path": bare}, dataset)


def test_validation_has_no_buckets(corpus, dataset):
    config = {"cuts_path": corpus.jsonl(corpus.cuts(1)), "bucket_batch_size": [1], "bucket_duration_bins": [900]}
    with pytest.raises(ValueError, match="validation data have no buckets"):
        build_dataloader(config, dataset, train=False)


def test_our_data_type_is_internal():
    with pytest.raises(ValueError, match=f"type: {DATA_TYPE} is internal"):
        read_drawn_rows({})


# Registration ------------------------------------------------------------


def test_registration_adds_our_prefix_once(monkeypatch):
    from nemo.collections.common.data.lhotse.cutset import get_parser_fn
    from nemo.core.classes import common

    from nemo_mtbi.register import register

    allowed = ["nemo.collections."]
    monkeypatch.setattr(common, "ALLOWED_TARGET_PREFIXES", allowed, raising=False)
    register()
    register()
    assert allowed == ["nemo.collections.", "nemo_mtbi."]
    assert get_parser_fn(DATA_TYPE) is read_drawn_rows


def test_registration_without_an_allow_list(monkeypatch):
    """NeMo 2.7 has none."""
    from nemo.core.classes import common

    from nemo_mtbi.register import register

    monkeypatch.delattr(common, "ALLOWED_TARGET_PREFIXES", raising=False)
    register()
    assert not hasattr(common, "ALLOWED_TARGET_PREFIXES")


def test_what_the_workers_of_a_stream_receive_pickles(corpus, dataset):
    loader = build_dataloader({**shar(corpus, corpus.cuts(3)), **PLAIN}, dataset)
    again = pickle.loads(pickle.dumps(loader.dataset))
    assert content(next(iter(again))) == content(next(iter(loader.dataset)))
