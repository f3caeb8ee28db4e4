"""python -m train: trains a UNETR; see --help."""

import dataclasses
import os
import signal
import sys

from train import distributed
from train.console import make_console
from train.data.dataset import BadCasesError, DataError
from train.interrupt import EXIT_STATUS
from train.launch import Launch, LaunchError, find_launch
from train.loop import DivergenceError
from train.options import RunOptions
from train.run import run
from train.run_dir import OptionError, read_options, resume_command, run_file
from unetr_flax.runtime.compilation_cache import CompilationCacheError, keep_compiled_programs
from unetr_flax.runtime.cudnn import CudnnError
from unetr_flax.runtime.malloc import keep_freed_memory


def main(args: list[str]) -> int:
    """Runs the command line.

    Returns:
      The exit status: 0 done, 1 bad data or diverged, 2 bad options, 130 interrupted.
    """
    cfg = None
    try:
        cfg = read_options(args)
        if cfg.run.keep_freed_memory:
            keep_freed_memory()
        keep_compiled_programs(cfg.run.compilation_cache)
        if (launch := _launch(cfg.run)) is not None:
            distributed.connect(*dataclasses.astuple(launch))
        return 0 if run(cfg) else EXIT_STATUS
    except (OptionError, LaunchError, CompilationCacheError, CudnnError) as error:
        return _fail(error, 2)
    except (
        DataError,
        BadCasesError,
        DivergenceError,
        distributed.MainProcessError,
    ) as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except KeyboardInterrupt:
        if cfg is not None and run_file(cfg.out).exists():
            return _fail(f"Interrupted. To go on:\n{resume_command(cfg)}", EXIT_STATUS)
        return _fail("Interrupted before the run began.", EXIT_STATUS)


def _launch(options: RunOptions) -> Launch | None:
    """Returns the processes of the run by the options, or else by the environment."""
    if options.coordinator_address is None:
        return find_launch(os.environ)
    return Launch(options.coordinator_address, options.num_processes, options.process_id)


def _fail(message: object, status: int) -> int:
    make_console(stderr=True).print(str(message), soft_wrap=True)
    return status


if __name__ == "__main__":
    # Before the loop handles signals, SIGTERM must end the program as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
