import platform
import subprocess
import sys

# Makes and frees 100 MB twenty times, and prints how often the kernel had to make a page.
PROGRAM = """
import resource, sys
from unetr_flax.malloc import keep_freed_memory
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


def test_freed_memory_is_used_again_where_malloc_can_be_told():
    def run(setting):
        return subprocess.check_output([sys.executable, "-c", PROGRAM, setting], text=True).split()

    told, kept = run("kept")
    (returned,) = run("returned")
    assert told == str(platform.libc_ver()[0] == "glibc")
    if told == "True":
        assert int(kept) < 100 < int(returned)
