# SPDX-License-Identifier: Apache-2.0
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from nemo_mtbi.evaluation.curves import read_curves


def log(folder, values):
    writer = EventFileWriter(str(folder))
    for tag, step, value in values:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=0.0, step=step, summary=summary))
    writer.close()


def test_curves_of_several_runs_and_logs(tmp_path):
    log(tmp_path / "a" / "version_0", [("val_wer", 10, 0.5), ("other", 10, 9.0), ("val_wer", 20, float("nan"))])
    log(tmp_path / "a" / "version_1", [("val_wer", 20, 0.25), ("train_loss", 10, 2.0)])
    log(tmp_path / "b", [("val_wer", 10, 1.0)])
    found = read_curves([str(tmp_path / "a"), str(tmp_path / "b")])
    assert found == {"val_wer": [[(10, 0.5), (20, 0.25)], [(10, 1.0)]], "train_loss": [[(10, 2.0)]]}


def test_long_curves_are_thinned_to_means(tmp_path):
    log(tmp_path, [("train_loss", step, float(step % 2)) for step in range(1000)])
    (points,) = read_curves([str(tmp_path)])["train_loss"]
    assert len(points) == 334 and points[0] == (2, pytest.approx(1 / 3)) and points[-1][0] == 999


def test_logs_that_are_missing_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no TensorBoard log"):
        read_curves([str(tmp_path / "nowhere")])
