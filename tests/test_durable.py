# SPDX-License-Identifier: Apache-2.0
import os

import pytest

from nemo_mtbi.durable import replacing


def test_a_file_is_replaced_when_the_new_one_is_whole_and_not_before(tmp_path):
    path = tmp_path / "new" / "a.nemo"
    for content in (b"one", b"two"):
        with replacing(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"three")
        raise KeyError
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.nemo"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
