import errno
import os

import pytest

from unetr_flax.runtime import memory
from unetr_flax.runtime.memory import (
    available_memory,
    is_out_of_files,
    is_out_of_memory,
    show_bytes,
)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1.234e9, "1.23 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_bytes_in_words(count, shown):
    assert show_bytes(count) == shown


@pytest.mark.parametrize(
    ("error", "of_memory", "of_files"),
    [
        (MemoryError(), True, False),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), True, False),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a"), False, True),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a"), False, False),
        # As tensorstore says it.
        (
            ValueError(
                'RESOURCE_EXHAUSTED: Error writing local file "0": Failed to open: "0.__lock": Too '
                "many open files [os_error_code='24']"
            ),
            False,
            True,
        ),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device"), False, False),
    ],
)
def test_files_and_disks_that_run_out_are_no_lack_of_memory(error, of_memory, of_files):
    assert (is_out_of_memory(error), is_out_of_files(error)) == (of_memory, of_files)


def test_the_smallest_limit_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    free = available_memory()
    assert 0 < free < 1 << 50
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container() == memory._UNKNOWN
    (tmp_path / "memory.max").write_text("9000\n")
    assert available_memory() == 2500


def test_the_limit_of_the_process_counts(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1 << 44, resource.RLIM_INFINITY))
    assert (1 << 44) - (1 << 43) < memory._process() < 1 << 44
