import errno
import os

import pytest

from unetr_flax.runtime.atomic import check_writable, staged, write_bytes, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    with staged(path) as temporary:
        temporary.write_text("half")
    assert path.read_bytes() == "ä".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    missing, taken, file = tmp_path / "none" / "a.txt", tmp_path / "taken", tmp_path / "file"
    (taken / "below").mkdir(parents=True)
    file.touch()
    for path, kind in (
        (missing, FileNotFoundError),
        (taken, IsADirectoryError),
        (file / "a.txt", NotADirectoryError),
    ):
        with pytest.raises(kind) as caught:
            write_text(path, "content")
        assert str(caught.value).endswith(f": '{path}'")
    with pytest.raises(FileNotFoundError, match=r"a\.txt'$"):
        check_writable(missing)
    check_writable(taken)
    assert sorted(tmp_path.iterdir()) == [file, taken]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def sync(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("unetr_flax.runtime.atomic.sync", sync)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'$"):
        write_bytes(tmp_path / "a.txt", b"content")
    assert not list(tmp_path.iterdir())


def test_errors_of_other_files_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"other\.txt'$"), staged(tmp_path / "a.txt"):
        (tmp_path / "other.txt").read_text()
    with pytest.raises(OSError, match=r"^told$"), staged(tmp_path / "a.txt"):
        raise OSError("told")
