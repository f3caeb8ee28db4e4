import tempfile
from pathlib import Path

import pytest

from train.command_line import parse
from train.data.dataset import DataError
from train.data.testing import describe, write_decathlon
from train.run_dir import OptionError
from train.task import default_cache, read_run_dataset


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


def test_more_regions_than_a_target_holds_are_refused(tmp_path):
    folder = write_decathlon(tmp_path)
    labels = {"background": 0} | {f"region {i}": [1, 2] for i in range(31)}
    describe(folder, labels=labels)
    assert read_run_dataset(folder, parse([])).num_outputs == 31
    describe(folder, labels={**labels, "one more": [1]})
    with pytest.raises(DataError, match="data set Test: 32 regions, must be at most 31"):
        read_run_dataset(folder, parse([]))


def test_regions_have_no_background_to_exclude(tmp_path):
    folder = write_decathlon(tmp_path)
    cfg = parse(["--exclude-background"])
    assert not read_run_dataset(folder, cfg).has_regions
    message = "^--exclude-background: is for classes; the data set Test has regions, which have no"
    with pytest.raises(OptionError, match=message):
        read_run_dataset(folder, parse(["--exclude-background", "--regions", "all=1,2"]))
    # The same for regions that the data declare.
    describe(folder, labels={"background": 0, "all": [1, 2], "posterior": 2})
    with pytest.raises(OptionError, match=message):
        read_run_dataset(folder, cfg)
