"""python -m train: trains a UNETR; see --help."""

import dataclasses
import os
import sys
import time

import jax

import train
from train import distributed
from train.checkpoint import CheckpointError
from train.config import Config
from train.console import make_console
from train.data.dataset import BadCasesError, DataError
from train.interrupt import Stopped, exit_status, raise_on_signals
from train.launch import Launch, LaunchError, find_launch
from train.loop import DivergenceError
from train.lost_process import HEARTBEAT_SECONDS, explain_on_stderr, is_broken_collective
from train.options import RunOptions
from train.run import run
from train.run_dir import OptionError, read_options, resume_command, run_file
from unetr_flax.runtime.compilation_cache import CompilationCacheError, keep_compiled_programs
from unetr_flax.runtime.cudnn import CudnnError
from unetr_flax.runtime.ending import end_process
from unetr_flax.runtime.malloc import keep_freed_memory
from unetr_flax.runtime.memory import is_out_of_memory


def main(args: list[str], started: float | None = None) -> int:
    """Runs the command line.

    Args:
      args: the command line without the program's name.
      started: when the program started, see `train.run.run`.

    Returns:
      The exit status: 0 done, 1 bad data, diverged, or files that cannot be written, 2 bad options,
      130 or 143 stopped by Ctrl-C or SIGTERM.
    """
    cfg = None
    try:
        cfg = read_options(args)
        if cfg.run.keep_freed_memory:
            keep_freed_memory()
        keep_compiled_programs(cfg.run.compilation_cache)
        if (launch := _launch(cfg.run)) is not None:
            explain_on_stderr(resume_command(cfg))
            distributed.connect(*dataclasses.astuple(launch))
        status = run(cfg, args, started)
        distributed.disconnect()
        return status
    except (OptionError, LaunchError, CompilationCacheError, CudnnError) as error:
        return _fail(error, 2)
    except (
        DataError,
        BadCasesError,
        CheckpointError,
        DivergenceError,
        distributed.MainProcessError,
    ) as error:
        _wait_for_verdict(error)
        return _fail(error, 1)
    except MemoryError as error:
        return _fail(_out_of_memory(error, cfg), 1)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        _wait_for_verdict(error)
        if not is_out_of_memory(error):
            raise
        return _fail(_out_of_memory(error, cfg), 1)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except Stopped as stopped:
        status = exit_status(stopped.number)
        if cfg is not None and run_file(cfg.out).exists():
            return _fail(f"Stopped. To go on:\n{resume_command(cfg)}", status)
        return _fail("Stopped before the run began.", status)


def _out_of_memory(error: BaseException, cfg: Config | None) -> str:
    """Says in one or two lines that memory ran out, and what goes on once there is more."""
    first = str(error).partition("\n")[0]
    message = f"Memory ran out: {first.rstrip('.') or 'Python does not say for what'}"
    if cfg is None or not run_file(cfg.out).exists():
        return message
    return f"{message}. Once there is more, to go on:\n{resume_command(cfg)}"


def _wait_for_verdict(error: BaseException) -> None:
    """Gives the distributed runtime time to find out who was lost; it then ends this process."""
    broken = any(is_broken_collective(e) for e in (error, error.__cause__) if e is not None)
    if broken and jax.distributed.is_initialized():
        time.sleep(HEARTBEAT_SECONDS + 30)


def _launch(options: RunOptions) -> Launch | None:
    """Returns the processes of the run by the options, or else by the environment."""
    if options.coordinator_address is None:
        return find_launch(os.environ)
    return Launch(options.coordinator_address, options.num_processes, options.process_id)


def _fail(message: object, status: int) -> int:
    make_console(stderr=True).print(str(message), soft_wrap=True)
    return status


if __name__ == "__main__":
    raise_on_signals()
    end_process(main(sys.argv[1:], train.STARTED))
