# SPDX-License-Identifier: Apache-2.0
"""What is stored as it is: plain containers, equal in all processes."""

import collections
import enum
import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_mtbi.parallel.checkpoint import content


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    pass


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (OmegaConf.create({"a": 1, "b": ["${a}", None], "c": "???"}), {"a": 1, "b": [1, None], "c": "???"}),
        ({"a": OmegaConf.create([1, {"b": 2}])}, {"a": [1, {"b": 2}]}),
        (collections.OrderedDict(a=collections.defaultdict(list, x=[1])), {"a": {"x": [1]}}),
        ({Text("a"): Text("b"), 3: Pair(1, 2.5)}, {"a": "b", 3: (1, 2.5)}),
        ([Colour.RED, Number.ONE, True, None, b"x"], ["red", 1, True, None, b"x"]),
        ([np.float32(0.5), np.int64(3), np.bool_(True)], [0.5, 3, True]),
        (Path("a/b.ckpt"), "a/b.ckpt"),
        (torch.float16, torch.float16),
        (float("inf"), float("inf")),
    ],
)
def test_containers_become_plain_and_load_without_unpickling(value, expected):
    found = content.plain_copy(value)
    assert found == expected

    def types(item):
        if isinstance(item, dict):
            return {type(item)}.union(*(types(part) for pair in item.items() for part in pair))
        return {type(item)}.union(*map(types, item)) if isinstance(item, (list, tuple)) else {type(item)}

    assert types(found) <= {dict, list, tuple, str, int, float, bool, bytes, type(None), torch.dtype}
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == expected


def test_tensors_are_copies_without_a_graph():
    parameter = torch.nn.Parameter(torch.ones(2))
    found = content.plain_copy({"a": parameter})["a"]
    with torch.no_grad():
        parameter.zero_()
    assert type(found) is torch.Tensor and not found.requires_grad and found.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("value", "where", "what"),
    [
        ({"callbacks": {"Timer": [0, threading.Lock()]}}, "checkpoint.callbacks.Timer.1", "_thread.lock"),
        ({"a": {1, 2}}, "checkpoint.a", "builtins.set"),
        ({"a": np.zeros(2)}, "checkpoint.a", "numpy.ndarray"),
        ({"a": len}, "checkpoint.a", "builtins.builtin_function_or_method"),
        ({object(): 1}, "key of checkpoint", "builtins.object"),
    ],
)
def test_anything_else_is_refused_by_name(value, where, what):
    with pytest.raises(ValueError, match=f"^{where} is a {what}, which no checkpoint can hold: let the state_dict"):
        content.plain_copy(value)


def test_equal_content_has_an_equal_hash():
    value = {"a": [1, (2.0, None)], "b": {"x": torch.tensor([1, 2])}}
    same = {"b": {"x": torch.tensor([1, 2])}, "a": [1, (2.0, None)]}
    assert content.fingerprint(value) == content.fingerprint(same)
    others = (
        {**value, "a": [1, (2.0, 0)]},
        {**value, "c": None},
        {**value, "b": {"x": torch.tensor([1, 3])}},
        {**value, "b": {"x": torch.tensor([1.0, 2.0])}},
    )
    assert len({content.fingerprint(item) for item in (value, *others)}) == 5


def test_what_differs_between_processes_is_named():
    def check(*parts):
        content.check_equal([content.hashes(part) for part in parts])

    first = {"epoch": 0, "lr_schedulers": [{"last": 1}], "callbacks": {"Timer": 1.5}, "loops": {"a": 1}}
    check(first, {**first, "callbacks": {"Timer": 2.5}})  # its own matter
    check(first, {**first, "lr_schedulers": []}, {"epoch": 0})  # where nothing trains
    with pytest.raises(RuntimeError, match="different values of 'epoch'"):
        check(first, first, {**first, "epoch": 1})
    with pytest.raises(RuntimeError, match="different values of 'lr_schedulers'"):
        check(first, {**first, "lr_schedulers": [{"last": 2}]})
