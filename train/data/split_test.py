import dataclasses
import json
from pathlib import Path

import pytest

from train.data.dataset import Case, DataError, Dataset
from train.data.split import split, split_dataset

CASES = tuple(Case(f"c{i}", (Path(f"i{i}"),), Path(f"l{i}")) for i in range(10))
DATASET = Dataset("Test", ("CT",), ("background", "a"), CASES)


def test_split_depends_on_names_and_seed_alone():
    train, val = split(CASES, 0.2, seed=0)
    assert (len(train), len(val)) == (8, 2)
    assert set(train) | set(val) == set(CASES)
    assert split(CASES[::-1], 0.2, seed=0) == (train, val)
    assert any(split(CASES, 0.2, seed=s) != (train, val) for s in (1, 2, 3))
    with pytest.raises(DataError, match=r"val_fraction=0\.01: leaves 0 of 10 cases"):
        split(CASES, 0.01, seed=0)


def test_the_data_sets_own_validation_cases_are_obeyed():
    dataset = dataclasses.replace(DATASET, validation=CASES[3:5])
    train, val = split_dataset(dataset, val_fraction=0.5, seed=0)
    assert val == CASES[3:5]
    assert train == CASES[:3] + CASES[5:]
    # Unless all cases are asked for.
    assert split_dataset(dataset, val_fraction=0, seed=0) == (CASES, ())


def test_folds_are_disjoint_and_complete():
    folds = [
        split_dataset(DATASET, val_fraction=0.2, seed=3, num_folds=4, fold=i) for i in range(4)
    ]
    assert sorted(case.name for _, val in folds for case in val) == [c.name for c in CASES]
    assert [len(val) for _, val in folds] == [3, 3, 2, 2]
    for train, val in folds:
        assert sorted(train + val, key=lambda case: case.name) == list(CASES)
    with pytest.raises(DataError, match=r"--num-folds 11: must be at most .* 10"):
        split_dataset(DATASET, val_fraction=0.2, seed=0, num_folds=11)


def test_splits_of_a_file(tmp_path):
    path = tmp_path / "splits_final.json"
    splits = [{"train": ["c0"], "val": ["c1"]}, {"train": ["c5", "c4", "c2"], "val": []}]
    path.write_text(json.dumps(splits))

    def read(fold):
        return split_dataset(DATASET, val_fraction=0.2, seed=0, splits=path, fold=fold)

    assert read(0) == ((CASES[0],), (CASES[1],))
    assert read(1) == ((CASES[2], CASES[4], CASES[5]), ())
    with pytest.raises(DataError, match="must be a list of splits; it has no number 2, the --fold"):
        read(2)
    for content, message in (
        ("{", "not readable as JSON"),
        ('[{"train": ["c0"]}]', "split 0: val: must be a list of case names"),
        ('[{"train": ["x"], "val": []}]', "train: x is no case of the data set, whose first is c0"),
        ('[{"train": [], "val": ["c0"]}]', "train: must name at least one case"),
        ('[{"train": ["c0"], "val": ["c0"]}]', "c0 is both in train and in val"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message) as error:
            read(0)
        assert str(error.value).startswith(f"--splits {path}: ")
