# SPDX-License-Identifier: Apache-2.0
"""Hundreds of hostile manifests, made from the parts of valid ones: nothing runs, leaks or is written elsewhere."""

import copy
import json
import shutil
import sys
import tempfile
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lhotse import Recording, SupervisionSegment
from omegaconf import OmegaConf

from nemo_mtbi.data.audio import load_samples
from nemo_mtbi.data.gate import read_gated
from nemo_mtbi.io.sources import FILES
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage
from nemo_mtbi.prepare.export import export

FRAMES = FrameCounter((LengthStage(400, 160, 400),), 16000)
SECRET = "t0ken-of-the-environment"
MARK = "CANARY"  # in every hostile command


class Watch:
    """Processes that Python starts meanwhile, addresses it connects to, and files it writes outside a folder."""

    def __init__(self):
        self.active, self.seen, self.folder = False, [], ""

    def __call__(self, event, args):
        if not self.active:
            return
        if event == "subprocess.Popen":
            # audioread looks for its programs, without a shell
            if MARK in repr(args) or str(args[0]).endswith("sh") or str(args[1][0]).endswith("sh"):
                self.seen.append((event, args))
        elif event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "pickle.find_class"):
            self.seen.append((event, args))
        elif event == "open" and isinstance(args[0], str) and set(str(args[1] or "")) & set("wax+"):
            nameless = args[0] == tempfile.gettempdir()  # a temporary file without a name
            if not nameless and not args[0].startswith(self.folder):
                self.seen.append((event, args))


WATCH = Watch()
sys.addaudithook(WATCH)  # can't be taken away again; it does nothing while it is not active


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder, and valid lines by the source that reads them."""
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 4000), 16000)
    recording = Recording.from_file(path)
    cut = recording.to_cut()
    cut.supervisions = [SupervisionSegment("a", "a", 0.0, 0.25, text="red", custom={"enrolment": recording})]
    cut.custom = {"target_audio": recording, "note": {"deep": ["text"]}}
    mono = cut.to_dict()
    mixed = cut.mix(cut.with_id("b"), snr=10).to_dict()
    nemo = {"audio_filepath": str(path), "duration": 0.25, "text": "red", "lang": "en", "deep": {"more": [1]}}
    asked = [{"from": "User", "value": "say it", "type": "text"}]
    asked += [{"from": "User", "value": str(path), "type": "audio", "duration": 0.25}]
    asked += [{"from": "Assistant", "value": "red", "type": "text"}]
    shared = [{"from": "human", "value": "<sound> say it"}, {"from": "gpt", "value": "red"}]
    lines = {
        "lhotse": [mono, mixed],
        "nemo": [nemo, {**nemo, "sampling_rate": 16000}],
        "multimodal_conversation": [{"id": "c", "conversations": asked}],
        "share_gpt": [{"id": "c", "sound": str(path), "conversations": shared}],
    }
    return folder, lines


def hostile_values(folder):
    """Sources, arrays, effects and names that run commands or fetch what they should not, if they are obeyed."""
    command = f"touch {folder.parent}/{MARK}"
    source = {"type": "command", "channels": [0], "source": command}
    recording = {"id": "x", "sources": [source], "sampling_rate": 16000, "num_samples": 4000, "duration": 0.25}
    recording["channel_ids"] = [0]
    pipe = {**recording, "sources": [{**source, "type": "url", "source": f"pipe:{command}"}]}
    array = {"storage_type": "kaldiio", "storage_path": f"{command} |", "storage_key": "x", "shape": [1]}
    reverb = {"name": "ReverbWithImpulseResponse", "kwargs": {"rir": recording}}
    cut = {"type": "MonoCut", "id": "x", "start": 0, "duration": 0.25, "channel": 0, "supervisions": []}
    return [
        source,
        [source],
        recording,
        pipe,
        array,
        {**array, "storage_type": "numpy_files", "storage_path": f"pipe:{command}"},
        {**array, "storage_type": "memory_raw", "storage_key": f"cos\nsystem\n(S'{command}'\ntR."},
        reverb,
        [reverb],
        {**cut, "recording": recording},
        {"cut": {**cut, "recording": pipe}, "type": "MonoCut", "offset": 0.0},
        command,
        f"pipe:{command}",
        f"pipe://host/; {command}",
        f"{command} |",
        f"/x;{command};.sph",
        f"x'; {command}; '.opus",
        "file:///etc/passwd",
        "/etc/passwd",
        "../../../etc/passwd",
        "http://127.0.0.1:9/${oc.env:TOKEN}",
        "s3://bucket/$TOKEN",
        "${oc.env:TOKEN}",
        {"$ref": "${oc.env:TOKEN}", "__class__": "os.system", "_target_": "os.system", "command": command},
    ]


def places(node, path=()):
    """All places of a tree, and one new key in each of its mappings."""
    yield path
    if isinstance(node, dict):
        for key in (*node, "transforms", "features", "target_audio"):
            yield from places(node[key], (*path, key)) if key in node else [(*path, key)]
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from places(item, (*path, index))


# Places where Lhotse or NeMo look for something to open, and what it is; a value elsewhere fails by its type alone.
KEYS = {
    "recording": "sources",
    "target_audio": "sources",
    "enrolment": "sources",
    "features": "storage_type",
    "cut": "recording",
    "sources": "channels",
    "transforms": "kwargs",
    "audio_filepath": None,
    "value": None,
    "sound": None,
    "source": None,
}


def fitting(place, values):
    """The hostile values that would be taken at a place."""
    key = place[-1] if place else ""
    if key not in KEYS:
        return values
    if KEYS[key] is None:
        return [value for value in values if isinstance(value, str)]
    kind = list if key in ("sources", "transforms") else dict
    found = [value for value in values if isinstance(value, kind)]
    return [value for value in found if KEYS[key] in (value[0] if kind is list else value)]


def put(node, path, value):
    node = copy.deepcopy(node)
    if not path:
        return copy.deepcopy(value)
    holder = node
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = copy.deepcopy(value)
    return node


def obey(folder, kind, lines, skip):
    """Reads all that a training or an export would read; returns what came out, as text."""
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"type": kind, ("cuts_path" if kind == "lhotse" else "manifest_filepath"): str(path)}
    entry |= {"audio_locator_tag": "<audio>", "audio_placeholders": "<sound>", "shuffle": False, "force_finite": True}
    config = OmegaConf.create({"input_cfg": [entry], "shard_seed": 0, "force_finite": True})
    from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config

    said = []
    with said_by(said):
        cuts, _ = read_gated(partial(read_cutset_from_config, config), config, FILES, skip)
        for item in cuts:
            said.append(repr(item))
            for cut in [turn.cut for turn in item.turns if hasattr(turn, "cut")] if hasattr(item, "turns") else [item]:
                with said_by(said):
                    load_samples(cut, FRAMES, FILES)
                with said_by(said):
                    shutil.rmtree(folder / "out", ignore_errors=True)
                    export([cut], folder / "out", "tarred", 1, "skip", policy=FILES)
    return "\n".join(said)


@contextmanager
def said_by(said):
    """Goes on after a user's error, and keeps its message; any other error is ours."""
    try:
        yield
    except ValueError as error:
        said.append(str(error))


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hostile_manifests_run_nothing_and_leak_nothing(parts, data):
    folder, valid = parts
    kind = data.draw(st.sampled_from(sorted(valid)))
    line = data.draw(st.sampled_from(valid[kind]))
    values = hostile_values(folder)
    for _ in range(data.draw(st.integers(1, 2))):
        known = [place for place in places(line) if not place or place[-1] in KEYS]
        place = data.draw(
            st.sampled_from(known) if data.draw(st.integers(0, 3)) else st.sampled_from(list(places(line)))
        )
        line = put(line, place, data.draw(st.sampled_from(fitting(place, values))))
    skip = data.draw(st.booleans())
    WATCH.seen, WATCH.folder, WATCH.active = [], str(folder), True
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN", SECRET)
        try:
            said = obey(folder, kind, [valid[kind][0], line], skip)
        finally:
            WATCH.active = False
    assert not WATCH.seen
    assert not (folder.parent / MARK).exists()
    assert SECRET not in said
