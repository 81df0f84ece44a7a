# SPDX-License-Identifier: Apache-2.0
"""What data may be read from: no command and no address without permission, wherever an entry holds it."""

import copy
import threading

import numpy as np
import pytest
import soundfile
from lhotse import AudioSource, CutSet, Features, MonoCut, Recording, SupervisionSegment
from lhotse.array import Array, TemporalArray
from lhotse.augmentation import ReverbWithImpulseResponse
from lhotse.image.image import Image
from lhotse.serialization import deserialize_item, open_best
from lhotse.utils import fastcopy

from nemo_mtbi.io.reading import Reading
from nemo_mtbi.io.sources import EVERYTHING, FILES, ForbiddenSourceError, SourcePolicy, check_cut, kind_of

COMMANDS_ONLY, REMOTE_ONLY = SourcePolicy(allow_commands=True), SourcePolicy(allow_remote=True)


@pytest.mark.parametrize(
    "location, kind",
    [
        ("a/b.wav", "local"),
        ("/data/12:30 talk.wav", "local"),
        ("notes: day 1.wav", "local"),
        ("C:\\audio\\a.wav", "local"),
        ("file:///data/a.wav", "local"),
        ("audio.tar/a.wav", "local"),
        ("pipe:cat a.wav", "command"),
        (" PIPE:cat a.wav", "command"),
        ("pipe://host/a.wav", "command"),
        ("cat a.ark |", "command"),
        ("| cat", "command"),
        ("http://host/a.wav", "remote"),
        ("HTTPS://host/a.wav", "remote"),
        ("s3://bucket/a.wav", "remote"),
        ("s3:bucket/a.wav", "remote"),
        ("ais://bucket/a.wav", "remote"),
        ("msc://profile/a.wav", "remote"),
        ("hdfs:/a.wav", "remote"),
        ("concat:http://host/a.wav", "remote"),
    ],
)
def test_a_location_is_local_remote_or_a_command(location, kind):
    assert kind_of(location) == kind


@pytest.fixture
def cut(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 8000), 16000)
    cut = Recording.from_file(path).to_cut()
    cut.supervisions = [SupervisionSegment("a", "a", 0.0, 0.5, text="red boat")]
    return cut


def source_of(kind, text):
    return [AudioSource(kind, [0], text)]


def in_recording(cut, bad):
    return fastcopy(cut, recording=bad)


def in_custom(cut, bad):
    return fastcopy(cut, custom={"target_audio": bad})


def in_list_of_custom(cut, bad):
    return fastcopy(cut, custom={"more": [{"deep": bad.to_dict()}]})


def in_supervision(cut, bad):
    return fastcopy(cut, supervisions=[fastcopy(cut.supervisions[0], custom={"enrolment": bad})])


def in_track(cut, bad):
    return cut.mix(in_recording(cut, bad).with_id("noise"), snr=10)


def in_impulse_response(cut, bad):
    return fastcopy(cut, recording=fastcopy(cut.recording, transforms=[ReverbWithImpulseResponse(rir=bad)]))


def in_impulse_response_of_a_mapping(cut, bad):
    reverb = {"name": "ReverbWithImpulseResponse", "kwargs": {"rir": bad.to_dict()}}
    return fastcopy(cut, recording=fastcopy(cut.recording, transforms=[reverb]))


def in_manifest(cut, bad):
    return deserialize_item(copy.deepcopy(in_track(cut, bad).to_dict()))


PLACES = [in_recording, in_custom, in_list_of_custom, in_supervision, in_track, in_impulse_response, in_manifest]
PLACES += [in_impulse_response_of_a_mapping]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind, text", [("command", "touch {}; cat {}"), ("url", "pipe:touch {}"), ("file", "pipe:x")])
def test_a_command_is_refused_wherever_it_stands(cut, place, kind, text):
    bad = place(cut, fastcopy(cut.recording, sources=source_of(kind, text)))
    with pytest.raises(ForbiddenSourceError, match=f"cut {bad.id} would run a command.*allow_commands: true"):
        check_cut(bad, FILES)
    with pytest.raises(ForbiddenSourceError):
        check_cut(bad, REMOTE_ONLY)
    check_cut(bad, COMMANDS_ONLY)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["url", "file"])
def test_an_address_needs_permission_of_its_own(cut, place, kind):
    bad = fastcopy(cut.recording, sources=source_of(kind, "http://host/a.wav"))
    for policy in (FILES, COMMANDS_ONLY):
        with pytest.raises(ForbiddenSourceError, match="from the network.*allow_remote: true"):
            check_cut(place(cut, bad), policy)
    check_cut(place(cut, bad), REMOTE_ONLY)


@pytest.mark.parametrize("place", PLACES)
def test_files_memory_and_shar_pass(cut, place):
    check_cut(place(cut, cut.recording), FILES)
    check_cut(place(cut, cut.move_to_memory("wav").recording), FILES)
    placeholder = fastcopy(cut.recording, sources=source_of("shar", ""))
    if "impulse" not in place.__name__:
        check_cut(place(cut, placeholder), FILES)


def features(storage, path):
    return Features("fbank", 50, 80, 0.01, 16000, 0.0, 0.5, storage, path, "key", "a", 0)


@pytest.mark.parametrize(
    "storage, path",
    [
        ("kaldiio", "feats.scp"),  # its table may hold commands
        ("lilcom_files", "pipe:cat x; "),
        ("numpy_files", "cat x |"),
        ("memory_raw", ""),  # unpickled
        ("pillow_memory", ""),
    ],
)
def test_arrays_that_run_code_are_refused(cut, storage, path):
    array = Array(storage, path, "key", [1, 2])
    held = [array, TemporalArray(array, 0, 0.1, 0.0), Image(storage, path, "key", 2, 2)]
    for bad in (fastcopy(cut, features=features(storage, path)), *(in_custom(cut, item) for item in held)):
        with pytest.raises(ForbiddenSourceError, match="run a command"):
            check_cut(bad, FILES)
        check_cut(bad, EVERYTHING)


def test_arrays_in_files_and_in_memory_pass_and_remote_ones_do_not(cut):
    for storage, path in (("lilcom_chunky", "a.lca"), ("memory_lilcom", None), ("numpy_files", "/data")):
        check_cut(in_custom(cut, Array(storage, path, "key", [1])), FILES)
    with pytest.raises(ForbiddenSourceError, match="network"):
        check_cut(in_custom(cut, Array("lilcom_url", "s3://bucket", "key", [1])), FILES)


def test_what_looks_like_a_source_and_is_none_passes(cut):
    origin = {"type": "url", "source": "https://example.com/corpus"}  # no channels: metadata
    check_cut(fastcopy(cut, custom={"origin": origin, "note": "pipe:x", "text": "see http://host"}), FILES)


def test_keys_of_a_configuration():
    assert SourcePolicy.of({"allow_remote": True, "batch_size": 2}) == REMOTE_ONLY
    assert SourcePolicy.of({"allow_commands": None}) == FILES
    with pytest.raises(ValueError, match="allow_commands must be true or false, got 'yes'"):
        SourcePolicy.of({"allow_commands": "yes"})


# Reading ------------------------------------------------------------


def run_by(canary):
    return f"touch {canary}"


@pytest.mark.parametrize("swallow", [False, True])
def test_what_readers_open_themselves_is_refused_even_if_they_catch_the_error(tmp_path, swallow):
    canary, entered = tmp_path / "canary", False
    with pytest.raises(ForbiddenSourceError, match="shard 3 would run a command"):
        with Reading(FILES, "shard 3"):
            entered = True
            try:
                open_best(f"pipe:{run_by(canary)}", "rb").read()
            except ValueError:
                if not swallow:
                    raise
    assert entered and not canary.exists()
    with Reading(COMMANDS_ONLY):
        open_best(f"pipe:{run_by(canary)}", "rb").close()
    assert canary.exists()


def test_audio_that_readers_open_themselves_is_refused(cut, tmp_path):
    canary = tmp_path / "canary"
    recording = fastcopy(cut.recording, sources=source_of("command", f"{run_by(canary)}; cat {tmp_path}/a.wav"))
    with pytest.raises(ForbiddenSourceError), Reading(FILES):
        recording.load_audio()
    assert not canary.exists()
    with Reading(COMMANDS_ONLY):
        assert np.array_equal(recording.load_audio(), cut.load_audio())
    assert canary.exists()


def test_the_name_of_a_sphere_file_is_not_run_by_a_shell(tmp_path):
    """Lhotse calls `sph2pipe … NAME` by a shell, without quotes."""
    canary = tmp_path / "canary"
    name = f"x;{run_by(canary)};.sph"
    with pytest.raises(ForbiddenSourceError, match="rename the file"), Reading(FILES):
        Recording.from_file(name)
    bad = Recording("a", source_of("file", name), 16000, 16000, 1.0).to_cut()
    with pytest.raises(ForbiddenSourceError, match="rename the file"):
        check_cut(bad, FILES)
    assert not canary.exists()
    check_cut(fastcopy(bad, recording=fastcopy(bad.recording, sources=source_of("file", "/data/ä-1_b.sph"))), FILES)


def test_the_name_of_an_opus_file_is_not_run_by_a_shell(monkeypatch, cut):
    bad = fastcopy(cut.recording, sources=source_of("file", "it's.opus"))
    check_cut(in_recording(cut, bad), FILES)  # libsndfile opens it
    monkeypatch.setenv("LHOTSE_LEGACY_OPUS_LOADING", "1")
    with pytest.raises(ForbiddenSourceError, match="holds a quote"):
        check_cut(in_recording(cut, bad), FILES)


def test_lhotse_is_as_always_outside_and_in_other_threads(tmp_path, cut):
    def read():
        found.append(open_best("pipe:echo there", "r").read())

    found = []
    with Reading(FILES):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    read()
    assert found == ["there\n", "there\n"]
    path = tmp_path / "cuts.jsonl.gz"
    with Reading(FILES):
        CutSet.from_cuts([cut]).to_file(path)
        (same,) = CutSet.from_file(path)
        assert isinstance(same, MonoCut) and np.array_equal(same.load_audio(), cut.load_audio())


def test_lines_pass_through_a_filter_before_the_reader_gets_them(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("one\ntwo\nthree\n")
    seen = []

    def lines(line, name, number):
        seen.append((name, number))
        return None if number == 2 else line.upper()

    with Reading(FILES, lines=lines), open_best(path) as file:
        assert list(file) == ["ONE\n", "THREE\n"]
    assert seen == [(str(path), 1), (str(path), 2), (str(path), 3)]
