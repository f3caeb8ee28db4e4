import os
import pwd
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from unetr_flax.runtime import compilation_cache as compilation
from unetr_flax.runtime.compilation_cache import (
    CompilationCacheError,
    default_folder,
    keep_compiled_programs,
)

# Waits for a line and runs a step whose argument is donated; prints how many programs were read
# from the cache, how many were compiled, and the result.
PROGRAM = """
import functools, sys
import jax
import jax.numpy as jnp
from unetr_flax.runtime import compilation_cache as compilation
compilation.MIN_COMPILE_SECONDS = 0
compilation.keep_compiled_programs(sys.argv[1] if len(sys.argv) > 1 else None)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.split("/")[-1]))
print("ready", flush=True)
sys.stdin.readline()

@functools.partial(jax.jit, donate_argnums=0)
def step(state):
    return jax.tree.map(lambda x: x - 0.1 * jnp.sin(x), state)

state = step(step({"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(5)}))
result = float(state["a"].sum())
print(events.count("cache_hits"), events.count("cache_misses"), result)
"""


def start(*args, **environment):
    """Starts a process that runs PROGRAM."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "1", **environment}
    # Silences a groundless warning of XLA's loader, see train/__init__.py.
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
    command = [sys.executable, "-c", PROGRAM, *args]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def printed(*processes):
    """Lets processes compile, all at the same time; returns what each prints, in words."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    words = [process.communicate()[0].split() for process in processes]
    assert not any(process.returncode for process in processes)
    return words


def run(*args, **environment):
    (words,) = printed(start(*args, **environment))
    return words


@pytest.fixture
def config(monkeypatch):
    """JAX's options as they are when a program starts, restored after the test."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_remove_custom_partitioning_ptr_from_cache_key",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_second_process_compiles_nothing(tmp_path):
    def kept():
        return sorted((tmp_path / "unetr_flax" / "jax").rglob("*-cache"))

    hits, misses, result = run(XDG_CACHE_HOME=str(tmp_path))
    assert (hits, int(misses) > 0) == ("0", True)
    first = kept()
    assert run(XDG_CACHE_HOME=str(tmp_path)) == [str(len(first)), "0", result]
    assert kept() == first
    assert run("", XDG_CACHE_HOME=str(tmp_path)) == ["0", "0", result]
    assert (tmp_path / "unetr_flax" / "jax").stat().st_mode & 0o777 == 0o700


def test_programs_that_were_cut_off_are_compiled_again(tmp_path):
    _, misses, result = run(str(tmp_path))
    kept = sorted(tmp_path.rglob("*-cache"))
    for number, path in enumerate(kept):
        # As a process leaves a file that is killed, or has no room, while it writes.
        os.truncate(path, path.stat().st_size * number // len(kept))
    assert run(str(tmp_path)) == ["0", misses, result]


def test_two_processes_fill_one_folder_at_the_same_time(tmp_path):
    folder = str(tmp_path / "new")
    (_, _, alone), *both = printed(start(""), start(folder), start(folder))
    assert [result for _, _, result in both] == [alone, alone]
    kept = len(list(tmp_path.rglob("*-cache")))
    assert kept
    assert run(folder) == [str(kept), "0", alone]


def test_the_folder_is_the_one_that_was_asked_for(config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "unetr_flax" / "jax"
    assert keep_compiled_programs() == default_folder()
    assert Path(config.jax_compilation_cache_dir).parent == default_folder()
    assert keep_compiled_programs(str(tmp_path / "mine")) == tmp_path / "mine"
    assert keep_compiled_programs("") is None
    assert config.jax_compilation_cache_dir is None
    config.update("jax_compilation_cache_dir", "/set/by/the/user")
    assert keep_compiled_programs() == Path("/set/by/the/user")
    config.update("jax_enable_compilation_cache", False)
    assert keep_compiled_programs(str(tmp_path / "unused")) is None
    assert not (tmp_path / "unused").exists()


def test_commands_keep_programs_of_accelerators_only(config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation.keep_for_accelerators()
    assert config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compilation.keep_for_accelerators()
    assert str(tmp_path) in config.jax_compilation_cache_dir


def test_a_folder_that_others_can_write_to_is_refused(config, monkeypatch, tmp_path):
    for mode in (0o777, 0o770, 0o702):
        tmp_path.chmod(mode)
        with pytest.raises(CompilationCacheError, match=r"others can write to it .*chmod 700"):
            keep_compiled_programs(str(tmp_path))
    tmp_path.chmod(0o755)
    assert keep_compiled_programs(str(tmp_path)) == tmp_path
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(CompilationCacheError, match=f"belongs to user {owner}, not to {owner + 1}"):
        keep_compiled_programs(str(tmp_path))


def test_a_folder_that_cannot_be_made(config, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="file"):
        keep_compiled_programs(str(file / "below"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert keep_compiled_programs() is None
    assert config.jax_compilation_cache_dir is None
    # A user without a home folder, as containers have them.
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(FileNotFoundError, match=r"^XDG_CACHE_HOME: must name a folder"):
        default_folder()
    assert keep_compiled_programs() is None


def test_programs_used_longest_ago_make_room(config, monkeypatch, tmp_path):
    monkeypatch.setattr(compilation, "MAX_BYTES", 25)
    (tmp_path / "processor").mkdir()
    for age, name in enumerate(("new", "used", "old", "oldest")):
        path = tmp_path / "processor" / f"{name}-cache"
        path.write_bytes(bytes(10))
        os.utime(path, (1e9 - age, 1e9 - 9 * age))
    keep_compiled_programs(str(tmp_path))
    left = {path.name for path in (tmp_path / "processor").iterdir()}
    assert left == {"new-cache", "used-cache"}
