import tempfile
from pathlib import Path

import pytest

from train.run_dir import OptionError
from train.task import default_cache


def test_a_home_that_cannot_be_written_leaves_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_cache() == tmp_path / "cache/unetr_flax/cases"
    # A file where the folder should be fails for every user, root included.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = default_cache()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert default_cache() == folder
    monkeypatch.setattr("os.getuid", lambda: 12345)
    Path(tmp_path, "unetr_flax-cases-12345").mkdir()
    with pytest.raises(OptionError, match="belongs to another user; --cache names another folder"):
        default_cache()
