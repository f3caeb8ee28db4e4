"""A run's folder and its run.json: how the run was started, so that it is resumed the same way.

Within the folder, `model/config.json` is the model's own file. Runs of older versions kept their
options in a config.json beside `checkpoints/`; such runs are still resumed and exported.
"""

import dataclasses
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from train.before_plan import provisional
from train.command_line import PHANTOMS, parse
from train.config import Config
from train.data.dataset import Case, Dataset
from train.data.stored_files import stored_files
from train.options import option
from train.run_lock import LOCK_NAME, LockedError, locked
from unetr_flax import UNETRConfig
from unetr_flax.runtime.atomic import write_text

RUN_NAME = "run.json"
# The plan of a run that planned itself, with reasons.
PLAN_NAME = "plan.txt"
# The folder of the phantoms, if a run makes its own data.
PHANTOMS_NAME = "data"
OLD_RUN_NAME = "config.json"


class OptionError(ValueError):
    """Options out of range; the message names the option, its value and what is allowed."""


def read_options(args: list[str]) -> Config:
    """Reads options from the command line and, when resuming, from the run's run.json.

    Returns:
      The options; `run.resume` is "yes" or "no". For a run that will be planned, those that are not
      given are only such as fit the others.

    Raises:
      OptionError: if an option is out of range, there is nothing to resume, or an option differs
        from the one the run was started with.
    """
    cfg = parse(args)
    if cfg.run.resume == "auto":
        resume = "yes" if run_file(cfg.out).exists() else "no"
        cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, resume=resume))
    run = cfg.run
    if run.resume == "yes":
        saved = _saved_options(cfg.out)
        # --resume and the other RunOptions are not saved: they come from the arguments again.
        defaults = dataclasses.replace(saved, run=dataclasses.replace(PHANTOMS.run, out=cfg.out))
        cfg = dataclasses.replace(parse(args, defaults), run=run)
        cfg = dataclasses.replace(cfg, run=dataclasses.replace(run, out=cfg.out))
        _compare_options(cfg, saved)
    if cfg.is_planned:
        cfg = provisional(args, cfg)
    try:
        cfg.check()
    except ValueError as error:
        raise OptionError(str(error)) from None
    return cfg


def resume_command(cfg: Config) -> str:
    """Returns the command that goes on with a run, with the options that its run.json lacks."""
    args = ["python", "-m", "train", "--out", str(cfg.out), "--resume"]
    for field in dataclasses.fields(cfg.run):
        value = getattr(cfg.run, field.name)
        if field.name not in ("out", "resume") and value != field.default:
            args += [option(field.name)] if value is True else [option(field.name), str(value)]
    return shlex.join(args)


def run_file(out: Path) -> Path:
    """Returns where a folder's run.json is or would be; the old name if only that exists."""
    path, old = out / RUN_NAME, out / OLD_RUN_NAME
    return old if old.exists() and not path.exists() else path


def checkpoints_folder(out: Path) -> Path:
    """Returns where a run's checkpoints are or would be."""
    return out / "checkpoints"


@contextmanager
def claimed(cfg: Config) -> Iterator[None]:
    """Holds the lock of the run's folder; call it on the process that writes.

    A new run may have a folder that is absent, empty, or that a run claimed without ever beginning.
    If the run fails before it has a run.json, the folder is left as it was found. So it is if a new
    run is refused before its first checkpoint: its run.json would allow no other options.

    Raises:
      OptionError: if the folder holds other things or another run, another process uses it,
        checkpoints could be saved but not read there, or it cannot be written.
    """
    out, new = cfg.out, cfg.run.resume == "no"
    if new:
        _refuse_taken(out)
    existed = out.exists()
    try:
        with locked(out):
            if new:
                _refuse_taken(out)
                _remove_leftovers(out)
            try:
                yield
            except OptionError:
                if new and not any(checkpoints_folder(out).glob("*/*")):
                    run_file(out).unlink(missing_ok=True)
                raise
            finally:
                if not run_file(out).exists():
                    _remove_leftovers(out)
                    (out / LOCK_NAME).unlink(missing_ok=True)
                    if not existed:
                        with suppress(OSError):  # something else is in the folder by now
                            out.rmdir()
    except LockedError as error:
        raise OptionError(str(error)) from None


def _refuse_taken(out: Path) -> None:
    """Raises OptionError unless a new run may have the folder."""
    # Orbax reads nothing back from such a path, which would come to light after training only.
    if set("[]") & set(str(out.absolute())):
        raise OptionError(f"--out {out}: checkpoints cannot be read from a path with [ or ]")
    if run_file(out).exists():
        raise OptionError(
            f"--out {out}: holds a run; add --resume to go on with it, or give another folder"
        )
    if out.exists() and (not out.is_dir() or not _is_free(out)):
        raise OptionError(f"--out {out}: exists and is not empty; give another folder")


def _is_free(out: Path) -> bool:
    """Returns whether a folder holds nothing, or nothing but what a run makes before it begins."""
    names = {path.name for path in out.iterdir()}
    return not names or (LOCK_NAME in names and names <= {LOCK_NAME, PHANTOMS_NAME})


def _remove_leftovers(out: Path) -> None:
    """Removes the phantoms of a run that never began, and the folders for its checkpoints."""
    shutil.rmtree(out / PHANTOMS_NAME, ignore_errors=True)
    checkpoints = checkpoints_folder(out)
    for folder in (*checkpoints.glob("*"), checkpoints):
        with suppress(OSError):  # absent, or not empty
            folder.rmdir()


def write_run_file(
    cfg: Config,
    dataset: Dataset,
    val_cases: tuple[Case, ...],
    model_config: UNETRConfig,
    plan: Sequence[str] = (),
) -> None:
    """Writes run.json; when resuming, checks that the saved file still holds.

    On resuming, the folder of the data and the file of splits may be others, and the epochs more
    than before; the file is written anew with them.

    Args:
      cfg: the options of the run.
      dataset: its data set.
      val_cases: its validation cases.
      model_config: its model.
      plan: the lines of its plan, see `train.plan.plan_options`; kept on resuming.

    Raises:
      OptionError: if the data or the model are not those that the run was started with.
    """
    record = {
        "options": cfg.to_dict(),
        "model": model_config.to_dict(),
        "dataset": {
            "name": dataset.name,
            "labels": list(dataset.labels),
            "modalities": list(dataset.modalities),
            **_region_record(dataset),
            "fingerprint": _fingerprint(dataset),
            "validation": [case.name for case in val_cases],
        },
    }
    if plan:
        record["plan"] = list(plan)
    if cfg.run.resume == "yes":
        saved = json.loads(run_file(cfg.out).read_text(encoding="utf-8"))
        # Runs of older versions have no class ids of regions. Data without a name of their own have
        # that of their folder, which may be another one by now.
        recorded = {key: value for key, value in saved["dataset"].items() if key != "name"}
        # Runs of older versions counted headers and folders, and not what is stored beside or in
        # them.
        if recorded.get("fingerprint") == _fingerprint(dataset, lambda path: [path]):
            del recorded["fingerprint"]
        if recorded != {key: record["dataset"].get(key) for key in recorded}:
            raise OptionError(
                f"--out {cfg.out}: the data set {dataset.name} is not what the run was started "
                "with; its cases, labels or files have changed"
            )
        _compare(record["model"], saved["model"], cfg.out)
        if saved["options"] == record["options"]:
            return
        record = saved | {"options": record["options"]}
    write_text(run_file(cfg.out), json.dumps(record, indent=1) + "\n")


def _region_record(dataset: Dataset) -> dict[str, Any]:
    """Returns what turns regions back into classes: their class ids, and a declared order."""
    record: dict[str, Any] = {}
    if dataset.regions:
        record["region_ids"] = [list(ids) for ids in dataset.regions]
    if dataset.regions_class_order:
        record["regions_class_order"] = list(dataset.regions_class_order)
    return record


def write_plan(out: Path) -> None:
    """Writes the plan in a folder's run.json to its plan.txt, if there is one."""
    plan = json.loads(run_file(out).read_text(encoding="utf-8")).get("plan")
    if plan:
        write_text(out / PLAN_NAME, "".join(f"{line}\n" for line in plan))


def recorded_schedule(out: Path) -> dict[str, Any] | None:
    """Returns the length that a budget gave to a run, as `record_schedule` has written it."""
    return json.loads(run_file(out).read_text(encoding="utf-8")).get("schedule")


def record_schedule(out: Path, schedule: dict[str, Any]) -> None:
    """Writes the length that a budget gave to a run into its run.json.

    Args:
      out: the run's folder.
      schedule: "total_steps", "validation_steps" and whatever tells how they were chosen.
    """
    record = json.loads(run_file(out).read_text(encoding="utf-8")) | {"schedule": schedule}
    write_text(run_file(out), json.dumps(record, indent=1) + "\n")


def _saved_options(out: Path) -> Config:
    path = run_file(out)
    try:
        return Config.from_dict(json.loads(path.read_text(encoding="utf-8"))["options"])
    except FileNotFoundError:
        raise OptionError(f"--out {out}: holds no run to resume, it has no {RUN_NAME}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{path}: is not the record of a run of this version: {error}") from None


def _compare_options(cfg: Config, saved: Config) -> None:
    """Raises OptionError if an option is not what it was, or may become."""
    budget = saved.training.budget
    if budget is not None and cfg.training.epochs != saved.training.epochs:
        raise OptionError(
            f"--epochs {cfg.training.epochs}: would do nothing, as --budget {budget} sets the "
            f"steps of the run in {cfg.out}"
        )
    if cfg.training.epochs < saved.training.epochs:
        raise OptionError(
            f"--epochs {cfg.training.epochs}: the run in {cfg.out} was started with "
            f"{saved.training.epochs}, which may grow but not shrink"
        )
    # Data that moved are recognized by their fingerprint, once they are read.
    may_change = ["epochs"]
    if cfg.data.data is not None and saved.data.data is not None:
        may_change.append("data")
    # So is a file of splits, by the cases that it names.
    if cfg.data.splits is not None and saved.data.splits is not None:
        may_change.append("splits")
    # Until a budget has set the steps there is nothing that would be another run's.
    if budget is not None and recorded_schedule(cfg.out) is None:
        may_change.append("budget")
    given, before = cfg.to_dict(), saved.to_dict()
    _compare({k: v for k, v in given.items() if k not in may_change}, before, cfg.out)


def _compare(given: dict[str, Any], saved: dict[str, Any], out: Path) -> None:
    for name, value in given.items():
        if value != saved[name]:
            raise OptionError(
                f"{option(name)} {_show(value)}: the run in {out} was started with "
                f"{_show(saved[name])}, which cannot change"
            )


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _fingerprint(dataset: Dataset, stored: Callable[[Path], list[Path]] = stored_files) -> str:
    """Hashes the names of the cases and the sizes of the files that each path stands for."""
    lines = []
    for case in dataset.cases:
        files = [file for path in case.files for file in stored(path)]
        lines.append(" ".join([case.name, *(str(file.stat().st_size) for file in files)]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
