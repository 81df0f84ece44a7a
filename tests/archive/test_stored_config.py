# SPDX-License-Identifier: Apache-2.0
"""What the configuration of an archive may say, and what of it is used."""

import pytest

from nemo_mtbi.archive.stored_config import check_stored
from nemo_mtbi.io.tensor_file import ArchiveError

GOOD = {
    "pretrained_asr": "asr.nemo",
    "generation": {"max_new_tokens": 64, "batch_tokens": 16384},
    "optim": {"name": "adamw", "lr": 1e-3, "sched": {"name": "CosineAnnealing"}},
    "target": "nemo_mtbi.models.mtbi_model.MTBIModel",
}


def test_what_belongs_to_a_run_or_a_machine_is_left_out():
    run = {
        "train_ds": {"cuts_path": "pipe:touch x"},
        "validation_ds": {"cuts_path": "a"},
        "test_ds": None,
        "encoder_cache": "/somewhere",
        "tensor_model_parallel_size": 8,
        "pipeline_model_parallel_size": 10**9,
        "dist_timeout": 1.0,
    }
    assert check_stored({**GOOD, **run}) == GOOD


@pytest.mark.parametrize("name", ["torch.optim.AdamW", "nemo.core.optim.novograd.Novograd", "torch.optim.SGD"])
def test_optimizers_by_class_are_kept(name):
    conf = {**GOOD, "optim": {"_target_": name, "lr": 1e-3}}
    assert check_stored(conf) == conf


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optim": {"_target_": "os.system"}}, "its optim._target_ is os.system, which is not an optimizer"),
        ({"optim": {"_target_": "torch.optim.adamw.torch.load"}}, "which is not an optimizer"),
        ({"optim": {"_target_": "torch.optim.os.System"}}, "which is not an optimizer"),
        ({"optim": {"_target_": ["torch.optim.AdamW"]}}, "which is not an optimizer"),
        (
            {"optim": {"sched": {"_target_": "nemo.core.optim.os.system"}}},
            "optim.sched._target_ is nemo.core",
        ),
        ({"optim": {"params": {"_target_": "torch.optim.AdamW"}}}, "optim.params._target_, which could call"),
        ({"chat": {"options": {"_target_": "torch.optim.AdamW"}}}, "chat.options._target_, which could call"),
        ({"_target_": "torch.optim.AdamW"}, "has _target_, which could call"),
        ({"loss": [{"a": [{"_args_": [1]}]}]}, r"loss\[0\].a\[0\]._args_, which could call"),
        ({"connector": {"cls": "os.system"}}, "connector.cls, which could call"),
        ({"optim": {"target": "os.system"}}, "optim.target, which could call"),
        (
            {"generation": {"max_new_tokens": 10**12}},
            "max_new_tokens is 1000000000000, more than 65536",
        ),
        ({"generation": {"batch_tokens": float("nan")}}, "its generation.batch_tokens is nan, more than"),
        ({"connector": {1: 2}}, "its configuration has the key '1'"),
    ],
)
def test_code_and_sizes_are_refused(change, message):
    with pytest.raises(ArchiveError, match=message):
        check_stored({**GOOD, **change})


def test_messages_have_no_terminal_escapes():
    with pytest.raises(ArchiveError) as error:
        check_stored({**GOOD, "_\x1b[2J": "\u202e"})
    assert str(error.value).isprintable() and "_\\x1b[2J" in str(error.value)
