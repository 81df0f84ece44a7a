# SPDX-License-Identifier: Apache-2.0
"""Front end and encoder of NeMo from settings that others have written: checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import nn

from nemo_mtbi.compat.torch import fake_tensors
from nemo_mtbi.io.tensor_file import ArchiveError, mismatches
from nemo_mtbi.io.untrusted_yaml import entries, shown

FRONT_END, ENCODER = "preprocessor", "encoder"
MODULES = "nemo.collections.asr.modules"
# Nothing else is built. What their constructors take are numbers and words: no path, no name of a class, no download.
CLASSES = {
    FRONT_END: ("AudioToMelSpectrogramPreprocessor",),
    ENCODER: ("ConformerEncoder", "ConformerEncoderAdapter", "RNNEncoder"),
}
# Largest numbers of a front end, whose tables no weights bound: hertz, seconds, samples, channels.
_LARGEST = {
    "sample_rate": 2**18,
    "window_size": 1,
    "window_stride": 1,
    "n_window_size": 2**15,
    "n_window_stride": 2**15,
    "n_fft": 2**15,
    "features": 1024,
    "frame_splicing": 64,
    "pad_to": 4096,
}
_MOST_LAYERS = 1000
_UNSTORED = 2**27  # numbers that modules hold beside their stored weights, such as tables of positions


def section_class(section: Any, name: str, allowed: Mapping[str, tuple[str, ...]] = CLASSES) -> type[nn.Module]:
    """Return the class of a section, which must be one of NeMo's speech modules that are known to be harmless.

    Args:
        section: keys and values, with ``_target_``.
        name: of the section, a key of ``allowed``.
        allowed: names of classes by section.

    Raises:
        ArchiveError: for any other class, or keys by which other code could be called; nothing is called then.
    """
    target = shown(section.get("_target_")) if isinstance(section, dict) else "nothing"
    parts = target.removeprefix(f"{MODULES}.").split(".")
    if not target.startswith(f"{MODULES}.") or len(parts) > 2 or not all(part.isidentifier() for part in parts):
        raise ArchiveError(f"its {name} is {target}, which is not a module of nemo.collections.asr")
    for _, key, _ in entries({key: value for key, value in section.items() if key != "_target_"}):
        if not isinstance(key, str) or key.startswith("_") or key in ("target", "cls"):
            raise ArchiveError(f"its {name} has {shown(key)}, which could call other code")
    try:
        cls = get_class(target)
    except (ImportError, AttributeError, ValueError, InstantiationException) as error:
        raise ArchiveError(f"its {name} is {target}, which this NeMo does not have") from error
    if not issubclass(cls, nn.Module) or not cls.__module__.startswith(f"{MODULES}."):
        raise ArchiveError(f"its {name} is {target}, which is not a module of nemo.collections.asr")
    if cls.__name__ not in allowed[name]:
        raise ArchiveError(f"its {name} is {target}, and only {', '.join(allowed[name])} can be read")
    return cls


def check_encoder(
    settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None, file: str, weights: str
) -> SimpleNamespace:
    """Build front end and encoder with tensors that hold nothing, and compare them with the stored weights.

    Args:
        settings: with the sections of front end and encoder, and ``sample_rate``.
        shapes: of their stored weights, by names that begin with those of the sections; ``None``: not known.
        file: that holds the settings, for messages.
        weights: the file of the weights, for messages.

    Returns:
        As :func:`build_encoder`.

    Raises:
        ArchiveError: if a class is not allowed, or sizes are not those of the weights; no memory was taken then.
    """
    for name in CLASSES:
        section_class(settings.get(name), name)
    rate = settings.get("sample_rate")
    if type(rate) is not int or not 0 < rate <= _LARGEST["sample_rate"]:
        raise ArchiveError(f"{file} has the sample_rate {shown(repr(rate))}")
    layers = settings[ENCODER].get("n_layers", 0)
    most = _MOST_LAYERS if shapes is None else min(len(shapes), _MOST_LAYERS)
    if type(layers) is not int or layers > most:
        raise ArchiveError(f"{file} describes {shown(layers)} layers, more than {weights} has")
    _check_front_end(settings[FRONT_END], rate)
    with fake_tensors():  # has shapes and takes no memory
        probe = build_encoder(settings, file)
        modules = {name: getattr(probe, name) for name in CLASSES}
        held = [value for module in modules.values() for value in (*module.parameters(), *module.buffers())]
        expected = {
            f"{name}.{key}": tuple(value.shape)
            for name, module in modules.items()
            for key, value in module.state_dict().items()
        }
    wrong = mismatches(expected, shapes) if shapes is not None else []
    if any("adapter_layer." in name for name in wrong):
        raise ArchiveError("its encoder has NeMo's adapters, which are not read: give the model without them")
    if wrong:
        raise ArchiveError(f"the encoder's weights do not fit its settings: {'; '.join(wrong[:5])}")
    beside = sum(value.numel() for value in held) - sum(math.prod(shape) for shape in expected.values())
    if beside > _UNSTORED:
        raise ArchiveError(f"{file} describes tables of {beside} numbers beside the weights")
    return probe


def _check_front_end(section: Mapping[str, Any], rate: int) -> None:
    """Refuse a front end whose tables would be large: no weights are there to compare them with."""
    for key, most in _LARGEST.items():
        value = section.get(key)
        if isinstance(value, (int, float)) and not -most <= value <= most:
            raise ArchiveError(f"the encoder's weights do not fit its settings: {key} is {value}, more than {most}")
    hertz, seconds = section.get("sample_rate", rate), section.get("window_size") or 0
    if isinstance(hertz, (int, float)) and isinstance(seconds, (int, float)):
        if hertz * seconds > _LARGEST["n_window_size"]:
            raise ArchiveError(f"the encoder's weights do not fit its settings: windows of {hertz * seconds} samples")


def build_encoder(settings: Mapping[str, Any], file: str) -> SimpleNamespace:
    """Build front end and encoder, as an ASR model has them, from settings that :func:`check_encoder` has passed.

    Returns:
        ``preprocessor``, ``encoder`` and ``cfg.sample_rate``.

    Raises:
        ArchiveError: if the settings do not describe them.
    """
    from nemo.core.classes.common import Serialization

    try:
        parts = {name: Serialization.from_config_dict(OmegaConf.create(settings[name])) for name in CLASSES}
    except Exception as error:  # constructors raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ArchiveError(f"{file} does not describe an encoder ({shown(reason)})") from error
    return SimpleNamespace(**parts, cfg=SimpleNamespace(sample_rate=settings["sample_rate"]))


@torch.no_grad()
def fill_encoder(encoder: nn.Module, tensor: Any) -> None:
    """Copy stored weights into modules.

    Args:
        encoder: whose names of weights begin with those of the sections.
        tensor: gives the stored tensor of a name.
    """
    for name, value in encoder.state_dict().items():
        value.copy_(tensor(name))
