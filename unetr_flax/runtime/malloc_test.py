import platform
import subprocess
import sys

# Allocates and frees 100 MB twenty times, and prints how often the kernel had to make a page.
KEEP = """
import resource, sys
from unetr_flax.runtime.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    print(keep_freed_memory())
import numpy as np

def touch():
    array = np.empty(100_000_000, np.uint8)
    array[::4096] = 1

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# Runs a program of JAX with an intermediate result of 100 MB and prints the fewest new pages of
# nine calls: on a busy machine some run on another thread, whose heap has no freed memory yet.
KEEP_PROGRAM = """
import resource, sys
from unetr_flax.runtime.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    print(keep_freed_memory())
import jax, jax.numpy as jnp

touch = jax.jit(lambda x: jnp.outer(x, x) @ x)
x = jnp.ones(5000)
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(touch(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""

# Keeps 200 MB that were freed; prints whether the process has them before and after returning them.
RETURN = """
from pathlib import Path
from unetr_flax.runtime.malloc import keep_freed_memory, return_freed_memory
keep_freed_memory()
import numpy as np

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident()
np.empty(200_000_000, np.uint8)[::4096] = 1
print(resident() - before > 100_000_000)
return_freed_memory()
print(resident() - before > 100_000_000)
"""


def run(program, *args):
    return subprocess.check_output([sys.executable, "-c", program, *args], text=True).split()


def is_glibc():
    return platform.libc_ver()[0] == "glibc"


def test_freed_memory_is_used_again_with_glibc():
    for program in (KEEP, KEEP_PROGRAM):
        told, kept = run(program, "kept")
        (returned,) = run(program, "returned")
        assert told == str(is_glibc())
        if told == "True":
            assert int(kept) < 1000 < int(returned)


def test_freed_memory_is_returned():
    if is_glibc():
        assert run(RETURN) == ["True", "False"]
