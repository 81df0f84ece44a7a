# SPDX-License-Identifier: Apache-2.0
"""Checks of the data configuration: what NeMo would ignore or decide in silence is an error with a remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from nemo_mtbi.config.checks import at_least, suggestion
from nemo_mtbi.config.schema import plain
from nemo_mtbi.io import sources
from nemo_mtbi.io.manifests import check_manifest
from nemo_mtbi.io.text import read_text

OWN_KEYS = ("rows_per_cut", *sources.KEYS)
IGNORED_KEYS = ("use_lhotse",)  # every NeMo data configuration has it
SOURCE_KEYS = (
    "input_cfg",
    "manifest_filepath",
    "tarred_audio_filepaths",
    "cuts_path",
    "shar_path",
    "skip_missing_manifest_entries",
    "text_field",
    "lang_field",
    "force_finite",
    "force_map_dataset",
    "force_iterable_dataset",
    "slice_length",
    "max_open_streams",
    "reweight_temperature",
    "shuffle",
)
PATH_KEYS = ("manifest_filepath", "tarred_audio_filepaths", "cuts_path", "shar_path", "noise_path", "rir_path")
# What manifest_filepath names, by the type of a source; of the other types NeMo has forms of its own.
MANIFESTS = {"nemo": "nemo", "nemo_tarred": "nemo", "multimodal_conversation": "lines", "share_gpt": "lines"}
_NO_LOCATIONS = ("tags",)  # texts that cuts get
LOCATION_KEYS = ("input_cfg", "cuts_path", "shar_path", "manifest_filepath")

# Where we differ from NeMo's defaults, if the user's configuration is silent.
DEFAULTS = {
    "max_duration": 300.0,  # no limit in NeMo; a two-hour recording is to be counted, not to end the run out of memory
    # 10000 each in NeMo, which a small blend fills by reading its data over and over before the first batch.
    "bucket_buffer_size": 2000,
    "shuffle_buffer_size": 2000,
    "num_cuts_for_bins_estimate": 1000,
}

_CUTS_AUDIO = "it would cut or join what the behaviors are about. Remove it; long audio is left out by max_duration"
_BLEND = "blend sources with input_cfg and weights instead"
_COMPUTED = "remove it, it follows from the model"
# Keys that may only have NeMo's default value, and what to do instead.
REFUSED = {
    "batch_duration": "it counts audio only: set batch_tokens, which counts prompts, frames and responses",
    "quadratic_duration": "use quadratic_factor, which counts tokens",
    "truncate_duration": _CUTS_AUDIO,
    "cut_into_windows_duration": _CUTS_AUDIO,
    "cut_into_windows_hop": _CUTS_AUDIO,
    "concatenate_samples": _CUTS_AUDIO,
    "multi_config": _BLEND,
    "sampler_fusion": _BLEND,
    "sampler_weights": _BLEND,
    "prompt_format": "the chat format of the model makes the prompts: remove it",
    "audio_locator_tag": "there are no placeholder tokens: remove it",
    "token_equivalent_duration": _COMPUTED,
    "measure_total_length": _COMPUTED,
    "cut_text_into_windows_tokens": "there are no text examples: remove it",
    "min_tps": "bound rows with max_tokens and audio with max_duration instead",
    "max_tps": "bound rows with max_tokens and audio with max_duration instead",
    "min_tpt": "there are no text examples: remove it",
    "max_tpt": "there are no text examples: remove it",
    "metadata_only": "training needs the audio: remove it",
    "tarred_random_access": "NeMo renamed it to skip_missing_manifest_entries",
}


def check_config(config: Mapping[str, Any], sample_rate: int) -> tuple[Any, int | None]:
    """Check the user's keys and fill in NeMo's defaults.

    Args:
        config: the user's data configuration.
        sample_rate: of the encoder, in hertz.

    Returns:
        NeMo's full configuration as a ``DictConfig``, and ``rows_per_cut``.

    Raises:
        ValueError: names the key and the remedy.
    """
    from nemo.collections.common.data.lhotse.dataloader import (
        LhotseDataLoadingConfig,
        make_structured_with_schema_warnings,
    )
    from omegaconf import OmegaConf

    given = plain(config)
    defaults = LhotseDataLoadingConfig()
    known = {entry.name for entry in fields(LhotseDataLoadingConfig)}
    _check_known(given, known)
    for key, remedy in REFUSED.items():
        if given.get(key) is not None and given[key] != getattr(defaults, key, None):
            raise ValueError(f"data key {key}={given[key]!r} is not supported: {remedy}")
    _check_batch_size(given)
    _check_seeds(given)
    if given.get("sample_rate") not in (None, sample_rate):
        raise ValueError(
            f"sample_rate is {given['sample_rate']}, but the speech encoder takes {sample_rate} Hz: remove the key, "
            "all audio is resampled"
        )
    values = {key: value for key, value in given.items() if key in known and key != "shard_seed"}
    full = make_structured_with_schema_warnings(OmegaConf.create({**DEFAULTS, **values}))
    full.sample_rate = sample_rate
    if full.bucket_duration_bins is not None:
        full.use_bucketing = True  # as NeMo 3 does
    if full.use_bucketing and "shuffle_buffer_size" not in given:
        full.shuffle_buffer_size = None  # Lhotse would add it to the buffer of the buckets
    return full, given.get("rows_per_cut")


def _check_known(given: Mapping[str, Any], known: set[str]) -> None:
    accepted = known | set(OWN_KEYS) | set(IGNORED_KEYS)
    for key in given:
        if key not in accepted:
            raise ValueError(f"unknown data key {key!r}: {suggestion(key, accepted, otherwise='remove it')}")


def _check_batch_size(given: Mapping[str, Any]) -> None:
    rules = [key for key in ("batch_size", "batch_tokens", "bucket_batch_size") if given.get(key) is not None]
    if len(rules) > 1:
        raise ValueError(
            f"{' and '.join(rules)} are both set, and each decides how many cuts make a batch: keep one. batch_tokens "
            "bounds the memory, batch_size the number of cuts"
        )
    if not rules:
        raise ValueError(
            "no batch size: set batch_tokens (prompt tokens + speech frames + response tokens) or batch_size"
        )
    for key in ("batch_size", "batch_tokens"):
        if given.get(key) is not None:
            at_least(1).check(key, given[key])
    bins = given.get("bucket_duration_bins")
    if given.get("bucket_batch_size") is not None and not bins:
        raise ValueError("bucket_batch_size needs bucket_duration_bins: costs in tokens, one per bucket")
    if bins is not None and not bins:
        raise ValueError("bucket_duration_bins is empty, so there is one bucket: set use_bucketing=false instead")
    if bins and isinstance(bins[0], Sequence):
        raise ValueError("two-dimensional bucket_duration_bins are not supported: a cut has one cost, in tokens")


def _check_seeds(given: Mapping[str, Any]) -> None:
    seed = given.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed must be an integer, got {seed!r}: a run has to be the same when it is resumed")
    if given.get("shard_seed", seed) not in (None, seed):
        raise ValueError(f"shard_seed={given['shard_seed']!r} is not supported: remove it, it follows from seed")
    if given.get("concurrent_bucketing"):
        raise ValueError("concurrent_bucketing: true makes the order of the data random: remove it")


def check_source(full, policy: sources.SourcePolicy) -> None:
    """Check that there is a source, that it is allowed, and that each local path in it exists.

    Args:
        full: NeMo's full configuration.
        policy: what data may be read from.

    Raises:
        ValueError: names the key and the path.
    """
    config = plain(full)
    if all(config[key] is None for key in LOCATION_KEYS):
        raise ValueError(f"no data: set one of {', '.join(LOCATION_KEYS)}")
    _check_allowed(config, "", policy)
    _check_paths(config, "")
    _check_manifests(config, "", "nemo")
    if config["input_cfg"] is not None:
        _check_group(config["input_cfg"], "input_cfg", policy)


def _check_allowed(value: Any, key: str, policy: sources.SourcePolicy) -> None:
    """Refuse locations in a configuration that its user did not allow, at any depth."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _NO_LOCATIONS:
                _check_allowed(item, f"{key}.{name}" if key else str(name), policy)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for number, item in enumerate(value):
            _check_allowed(item, f"{key}[{number}]", policy)
    elif isinstance(value, (str, Path)):
        policy.check(str(value), f"{key}={value}")


def _check_group(group: Any, where: str, policy: sources.SourcePolicy) -> None:
    """Check the entries of an ``input_cfg``, and of the groups in it."""
    from nemo.collections.common.data.lhotse.cutset import get_known_config_data_types
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(group, (str, Path)):
        _check_path(where, str(group))
        if _is_remote(str(group)):
            return
        text, where = read_text(group, where), f"{where} ({group})"
        try:
            group = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
        except (yaml.YAMLError, OmegaConfBaseException, AssertionError) as error:
            raise ValueError(f"{where} must be a YAML list of sources: {error}") from error
        _check_allowed(group, where, policy)
    if not isinstance(group, list) or not group:
        raise ValueError(f"{where} must be a list of sources, got {group!r}")
    weighted = [isinstance(entry, Mapping) and entry.get("weight") is not None for entry in group]
    if any(weighted) and not all(weighted):
        raise ValueError(f"{where}: give every source a weight, or none of them")
    for number, entry in enumerate(group):
        place = f"{where}[{number}]"
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if kind not in get_known_config_data_types():
            known = ", ".join(sorted(get_known_config_data_types()))
            raise ValueError(f"{place}.type is {kind!r}, but must be one of {known}")
        if "shard_seed" in entry:
            raise ValueError(f"{place}.shard_seed is not supported: remove it, it follows from seed")
        _check_paths(entry, f"{place}.")
        _check_manifests(entry, f"{place}.", kind)
        if kind == "group":
            _check_group(entry.get("input_cfg"), f"{place}.input_cfg", policy)


def _check_paths(config: Mapping[str, Any], prefix: str) -> None:
    for key in PATH_KEYS:
        for path in _paths(config.get(key)):
            _check_path(f"{prefix}{key}", path)


def _check_manifests(config: Mapping[str, Any], prefix: str, kind: str | None) -> None:
    """Check the first line of each local manifest; of shards, which may be empty, only that they are files."""
    from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths

    for key, form in (("cuts_path", "cuts"), ("manifest_filepath", MANIFESTS.get(kind or ""))):
        patterns = [pattern for pattern in _paths(config.get(key)) if not _is_remote(pattern)]
        files = [file for pattern in patterns for file in expand_sharded_filepaths(pattern)]
        for file in files:
            if form is not None and (len(files) == 1 or Path(file).is_dir()):
                check_manifest(file, f"{prefix}{key}", form)


def _paths(value: Any) -> Iterator[str]:
    """Yield the paths in a string, in nested lists (which may hold weights) and in mappings of fields."""
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _paths(item)


def _is_remote(path: str) -> bool:
    return sources.kind_of(path) != "local" or path == "-"


def _check_path(key: str, pattern: str) -> None:
    from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths

    for path in [] if _is_remote(pattern) else expand_sharded_filepaths(pattern):
        file = Path(path)
        if not file.exists():
            raise ValueError(f"{key}: there is no {path!r}: check the path (the working directory is {Path.cwd()})")
        if file.is_file():
            try:
                file.open("rb").close()
            except OSError as error:
                raise ValueError(f"{key}: {path!r} cannot be read: {error}") from error
