import dataclasses
import hashlib
import json
import shlex

import numpy as np
import pytest

from train.command_line import parse
from train.data.dataset import Case
from train.data.layouts import read_dataset
from train.data.testing import voxels_of, write_metaimage
from train.run_dir import OptionError, read_options, record_schedule, resume_command, write_run_file


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--keep-checkpoints 5 --save-minutes 2.5 --fsdp 4 --depth-shards 2 --workers 2",
        "--keep-freed-memory --cache '/scratch/my cases' --compilation-cache ''",
        "--coordinator-address host:1 --num-processes 2 --process-id 1",
    ],
)
def test_the_command_that_goes_on_has_what_the_run_needs(options):
    command = resume_command(parse(shlex.split(f"--out o --epochs 3 {options}")))
    assert command == f"python -m train --out o --resume {options}".strip()
    parsed = parse(shlex.split(command)[3:]).run
    assert parsed == dataclasses.replace(
        parse(shlex.split(options)).run, out=parsed.out, resume="yes"
    )


def test_data_in_a_folder_of_another_name_are_recognized(data, tmp_path):
    folder, moved, out = (tmp_path / name for name in ("data", "moved", "run"))
    out.mkdir()
    folder.mkdir()
    for name in ("imagesTr", "labelsTr"):
        (folder / name).symlink_to(data / name)

    def write(folder, resume, **changes):
        cfg = parse(["--data", str(folder), "--out", str(out), "--resume", resume])
        dataset = dataclasses.replace(read_dataset(folder, ("CT",)), **changes)
        write_run_file(cfg, dataset, (), cfg.model_config(in_channels=1, out_channels=2))
        return json.loads((out / "run.json").read_text())

    record = write(folder, "no")
    folder.rename(moved)
    resumed = write(moved, "yes")
    assert resumed["options"]["data"] == str(moved)
    assert resumed["dataset"] == record["dataset"]
    with pytest.raises(OptionError, match="labels or files have changed"):
        write(moved, "yes", labels=("background", "other"))


def test_a_file_of_splits_may_move_with_the_data(data, tmp_path):
    def write(resume, splits, validation):
        args = ["--data", str(data), "--splits", str(splits), "--out", str(tmp_path)]
        cfg = read_options([*args, "--resume", resume])
        dataset = read_dataset(data, ("CT",))
        cases = tuple(case for case in dataset.cases if case.name in validation)
        write_run_file(cfg, dataset, cases, cfg.model_config(in_channels=1, out_channels=2))
        return json.loads((tmp_path / "run.json").read_text())

    record = write("no", tmp_path / "old.json", ["box_1"])
    resumed = write("yes", tmp_path / "new.json", ["box_1"])
    assert resumed["options"] == record["options"] | {"splits": str(tmp_path / "new.json")}
    with pytest.raises(OptionError, match="cases, labels or files have changed"):
        write("yes", tmp_path / "new.json", ["box_2"])


def test_epochs_cannot_make_a_run_with_a_budget_longer(tmp_path):
    cfg = parse(["--out", str(tmp_path), "--budget", "1h", "--epochs", "3"])
    (tmp_path / "run.json").write_text(json.dumps({"options": cfg.to_dict()}))
    args = ["--out", str(tmp_path), "--resume"]
    for again in ([], ["--epochs", "3"]):
        assert read_options([*args, *again]).training.epochs == 3
    with pytest.raises(OptionError) as error:
        read_options([*args, "--epochs", "9"])
    assert str(error.value) == (
        f"--epochs 9: would do nothing, as --budget 1h sets the steps of the run in {tmp_path}"
    )


@pytest.mark.parametrize("older", [False, True])
def test_voxels_beside_their_header_are_noticed_if_they_changed(older, data, tmp_path):
    header = write_metaimage(tmp_path / "a.mhd", np.zeros((2, 2, 2)))
    dataset = read_dataset(data, ("CT",))
    dataset = dataclasses.replace(dataset, cases=(Case("a", (header,), header),))

    def write(resume):
        cfg = parse(["--data", str(data), "--out", str(tmp_path), "--resume", resume])
        write_run_file(cfg, dataset, (), cfg.model_config(in_channels=1, out_channels=2))

    write("no")
    if older:
        record = json.loads((tmp_path / "run.json").read_text())
        size = header.stat().st_size
        record["dataset"]["fingerprint"] = hashlib.sha256(f"a {size} {size}".encode()).hexdigest()
        (tmp_path / "run.json").write_text(json.dumps(record))
    write("yes")
    # What older versions noticed is noticed still, and no more.
    changed = header if older else voxels_of(header)
    changed.write_bytes(changed.read_bytes() + b"0\n")
    with pytest.raises(OptionError, match="labels or files have changed"):
        write("yes")


def test_a_budget_may_change_until_it_has_set_the_steps(tmp_path):
    cfg = parse(["--out", str(tmp_path), "--budget", "1s"])
    (tmp_path / "run.json").write_text(json.dumps({"options": cfg.to_dict()}))
    args = ["--out", str(tmp_path), "--resume", "--budget", "2m"]
    assert read_options(args).training.budget == "2m"
    record_schedule(tmp_path, {"total_steps": 1, "validation_steps": 1})
    with pytest.raises(OptionError, match=r"^--budget 2m: the run in .* was started with 1s"):
        read_options(args)
