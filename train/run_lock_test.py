import os
import signal
import subprocess
import sys
import textwrap

import pytest

from train.run_lock import LockedError, locked

# Holds the lock, starts a child that would outlive it, and waits.
OWNER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from train.run_lock import locked
    with locked(Path(sys.argv[1])):
        child = os.fork()
        if child:
            print(child, flush=True)
        time.sleep(60)
    """
)


@pytest.fixture
def owner(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        child = int(process.stdout.readline())
        try:
            yield process
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


def test_a_lock_is_refused_with_its_owner_until_the_owner_is_dead(owner, tmp_path, monkeypatch):
    said = f"is in use by process {owner.pid} on .*; give another folder"
    with pytest.raises(LockedError, match=said), locked(tmp_path):
        pass
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    said = "this is task 1 of 2, each of which would train alone"
    with pytest.raises(LockedError, match=said), locked(tmp_path):
        pass
    owner.kill()
    owner.wait()
    # The owner's child is still there, and holds nothing.
    with locked(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_is_free_once_the_context_has_ended(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "new" / "run"):
            pass


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("train.run_lock.fcntl.lockf", unsupported)
    with locked(tmp_path):
        pass
    assert capsys.readouterr().err.endswith("Function not implemented; goes on without a lock\n")
