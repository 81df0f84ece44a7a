# SPDX-License-Identifier: Apache-2.0
"""NeMo's internals: the state of a restoration, attributes of a ``ModelPT``, and those of its encoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


def allow_targets(prefix: str) -> None:
    """Let NeMo build classes whose names begin with ``prefix`` from configurations. Safe to call again.

    Adds to ``nemo.core.classes.common.ALLOWED_TARGET_PREFIXES``, which NeMo 3 compares targets with so that a
    ``.nemo`` cannot run code of its choice; NeMo 2 has no such list. A function by which packages register would
    replace it.
    """
    from nemo.core.classes import common

    allowed = getattr(common, "ALLOWED_TARGET_PREFIXES", None)
    if allowed is not None and prefix not in allowed:
        allowed.append(prefix)


def is_restoring() -> bool:
    """Return whether NeMo is restoring a model in this process: its constructor must not open the data then.

    What ``ModelPT._is_model_being_restored`` returns, by ``AppState``, where it is kept.
    """
    from nemo.utils import AppState

    return AppState().is_model_being_restored


def set_restoring(restoring: bool) -> None:
    """Set what :func:`is_restoring` returns.

    What ``ModelPT._set_model_restore_state`` does, by ``AppState``. NeMo leaves it on after an error, and the next
    model would be built without its data. A context manager of NeMo would replace it.
    """
    from nemo.utils import AppState

    state = AppState()
    state.is_model_being_restored = restoring
    state.nemo_file_folder = None


def record_data_config(model: Any, name: str, config: Any) -> None:
    """Write the configuration of a loader to ``model.cfg`` and to the hyperparameters in checkpoints.

    Uses ``_update_dataset_config``, as ``setup_training_data`` of NeMo's models does: it is written for subclasses,
    and ``cfg`` itself is locked.

    Args:
        model: a ``ModelPT``.
        name: ``train`` or ``validation``.
        config: of the loader.
    """
    model._update_dataset_config(dataset_name=name, config=config)


def set_training_loader(model: Any, loader: Any) -> None:
    """Let ``model.train_dataloader()`` return a loader.

    Sets ``_train_dl``, as ``setup_training_data`` of NeMo's models does: ``ModelPT`` itself reads it, where it
    prepares the optimizer's schedule. A return value of ``setup_training_data`` would replace it.
    """
    model._train_dl = loader


def set_validation_loader(model: Any, loader: Any) -> None:
    """Let ``model.val_dataloader()`` return a loader: see :func:`set_training_loader`. Sets ``_validation_dl``."""
    model._validation_dl = loader


def set_parameter_groups(model: Any, parameter_groups: list[dict[str, Any]]) -> None:
    """Give a ``ModelPT`` the parameter groups of its optimizer.

    Sets ``_optimizer_param_groups``, as ``setup_optimizer_param_groups`` of NeMo's models does: it is what that method
    is for. A return value of the method would replace it.
    """
    model._optimizer_param_groups = parameter_groups


def set_connector(model: Any, connector: Any) -> None:
    """Give one ``ModelPT`` the connector that saves it.

    Sets ``_save_restore_connector``: the public ``update_save_restore_connector`` sets it for the class, so for all
    models in the process.
    """
    model._save_restore_connector = connector


def connector_of(model: Any) -> Any:
    """Return the connector that saves a ``ModelPT``: what :func:`set_connector` or NeMo's ``restore_from`` has set."""
    return model._save_restore_connector


def module_config(module: Any) -> Any:
    """Return the configuration that NeMo has built a module from.

    Reads ``_cfg``: the public ``to_config_dict`` rewrites it in the form of the newest version, and the configuration
    is stored as it was given.
    """
    return module._cfg


class Convolution(NamedTuple):
    """One strided convolution of a (Fast)Conformer's subsampling, in its own frames; padding is that of both sides."""

    kernel: int
    stride: int
    padding: int
    ceil_mode: bool


def subsampling_convolutions(encoder: Any) -> Iterator[Convolution]:
    """Yield the strided convolutions in front of a (Fast)Conformer.

    Reads ``_sampling_num``, ``_kernel_size``, ``_stride``, ``_left_padding``, ``_right_padding`` and ``_ceil_mode`` of
    its ``pre_encode``. NeMo counts frames by running the module only; a public method that counts them from numbers of
    samples would replace it.

    Raises:
        AttributeError: if the encoder has no such convolutions.
    """
    subsampling: Any = getattr(encoder, "pre_encode", None)
    for _ in range(subsampling._sampling_num):
        yield Convolution(
            subsampling._kernel_size,
            subsampling._stride,
            subsampling._left_padding + subsampling._right_padding,
            subsampling._ceil_mode,
        )


def first_convolution_numbers(encoder: Any) -> int:
    """Return the numbers that the first convolution of a (Fast)Conformer gives for two feature frames.

    Reads ``_conv_channels`` and ``_feat_in`` of its ``pre_encode``; the convolution halves frames and bands. NeMo
    keeps both sizes there only, once the encoder is built. Public attributes would replace it.
    """
    return encoder.pre_encode._conv_channels * (encoder.pre_encode._feat_in // 2)
