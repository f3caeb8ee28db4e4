import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from train.data.decathlon import BadCasesError, DataError, read_cases, read_dataset, split
from train.data.phantoms import make_phantoms
from unetr_flax.imaging.stored_voxels import StoredVoxels


def write(path, array, affine=None):
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def overwrite(path, change):
    image = nib.load(path)
    array = change(np.asarray(image.dataobj).copy())
    write(path, array, image.affine)


def problems(dataset):
    """Lists what is wrong with the files of a data set, one line each."""
    try:
        read_cases(dataset, dataset.cases, lambda *case: None)
    except BadCasesError as error:
        return str(error).splitlines()
    return []


@pytest.fixture
def folder(tmp_path):
    """Writes three good cases in Decathlon layout, with the hidden files of real folders."""
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "._case_0.nii.gz").write_bytes(b"macOS")
    cases = []
    for i in range(3):
        name = f"case_{i}.nii.gz"
        write(tmp_path / "imagesTr" / name, rng.random((6, 5, 4)).astype(np.float32))
        write(tmp_path / "labelsTr" / name, rng.integers(0, 3, (6, 5, 4)).astype(np.uint8))
        cases.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    describe(tmp_path, training=cases)
    return tmp_path


def describe(folder, **changes):
    path = folder / "dataset.json"
    content = {
        "name": "Test",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "anterior", "2": "posterior"},
        "numTraining": 99,
    }
    if path.exists():
        content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def test_reads_what_real_folders_have(folder):
    dataset = read_dataset(folder)
    assert dataset.name == "Test"
    assert dataset.modalities == ("MRI",)
    assert dataset.labels == ("background", "anterior", "posterior")
    assert [case.name for case in dataset.cases] == ["case_0", "case_1", "case_2"]
    assert dataset.cases[0].image == folder / "imagesTr/case_0.nii.gz"
    assert problems(dataset) == []


def test_good_cases_are_handed_over_in_order_from_one_read_of_each_file(folder, monkeypatch):
    dataset = read_dataset(folder)
    read = []
    load = StoredVoxels.read
    monkeypatch.setattr(StoredVoxels, "read", lambda file: read.append(file.path) or load(file))
    done = []
    results = read_cases(dataset, dataset.cases[1:], lambda *case: case, done.append)
    assert done == [1, 2]
    assert [case for case, _, _ in results] == list(dataset.cases[1:])
    assert sorted(read) == sorted(p for case in dataset.cases[1:] for p in (case.image, case.label))
    for case, volume, labels in results:
        np.testing.assert_array_equal(volume.array[..., 0], nib.load(case.image).dataobj)
        np.testing.assert_array_equal(labels, nib.load(case.label).dataobj)


def test_bad_cases_are_not_handed_over(folder):
    (folder / "labelsTr/case_1.nii.gz").unlink()
    dataset = read_dataset(folder)
    used = []
    with pytest.raises(BadCasesError, match=r"case_1\.nii\.gz: no such file$"):
        read_cases(dataset, dataset.cases, lambda case, *_: used.append(case.name))
    assert sorted(used) == ["case_0", "case_2"]


def _remove_image(folder):
    (folder / "imagesTr/case_1.nii.gz").unlink()
    return "imagesTr/case_1.nii.gz: no such file"


def _remove_label(folder):
    (folder / "labelsTr/case_1.nii.gz").unlink()
    return "labelsTr/case_1.nii.gz: no such file"


def _truncate(folder):
    path = folder / "imagesTr/case_1.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    return "imagesTr/case_1.nii.gz: not a readable NIfTI file"


def _wrong_checksum(folder):
    path = folder / "labelsTr/case_1.nii.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    return "labelsTr/case_1.nii.gz: not a readable NIfTI file"


def _nan(folder):
    def change(array):
        array[0, 0, 0] = np.nan
        return array

    overwrite(folder / "imagesTr/case_1.nii.gz", change)
    return "imagesTr/case_1.nii.gz: 1 voxels are NaN or infinite"


def _other_shape(folder):
    overwrite(folder / "labelsTr/case_1.nii.gz", lambda a: a[:5])
    return "labelsTr/case_1.nii.gz: shape (5, 5, 4), its image has (6, 5, 4)"


def _other_affine(folder):
    path = folder / "labelsTr/case_1.nii.gz"
    affine = np.eye(4)
    affine[0, 3] = 0.5
    write(path, np.asarray(nib.load(path).dataobj), affine)
    return "labelsTr/case_1.nii.gz: affine differs from its image's by up to 0.5 mm"


def _unknown_label(folder):
    overwrite(folder / "labelsTr/case_1.nii.gz", lambda a: np.where(a == 2, 7, a))
    return "labelsTr/case_1.nii.gz: label ids [7], dataset.json has 0 to 2"


def _negative_label(folder):
    overwrite(folder / "labelsTr/case_1.nii.gz", lambda a: a.astype(np.int16) - 1)
    return "labelsTr/case_1.nii.gz: label ids [-1]"


def _fraction(folder):
    overwrite(folder / "labelsTr/case_1.nii.gz", lambda a: a.astype(np.float32) + 0.25)
    return "labelsTr/case_1.nii.gz: labels must be whole numbers"


def _channels(folder):
    overwrite(folder / "imagesTr/case_1.nii.gz", lambda a: np.stack([a, a], -1))
    return "imagesTr/case_1.nii.gz: 2 channels, dataset.json has 1 modalities"


@pytest.mark.parametrize(
    "damage",
    [
        _remove_image,
        _remove_label,
        _truncate,
        _wrong_checksum,
        _nan,
        _other_shape,
        _other_affine,
        _unknown_label,
        _negative_label,
        _fraction,
        _channels,
    ],
)
def test_every_bad_file_is_one_line(folder, damage):
    expected = damage(folder)
    (problem,) = problems(read_dataset(folder))
    assert problem.startswith(f"{folder}/{expected}")


def test_all_bad_files_are_told_at_once(folder):
    for i in range(3):
        (folder / f"labelsTr/case_{i}.nii.gz").unlink()
    assert len(problems(read_dataset(folder))) == 3


@pytest.mark.parametrize(("shift", "count"), [(5e-4, 0), (2e-3, 1)])
def test_affines_may_differ_by_rounding_only(folder, shift, count):
    path = folder / "labelsTr/case_1.nii.gz"
    affine = np.eye(4)
    affine[1, 3] = shift
    write(path, np.asarray(nib.load(path).dataobj), affine)
    assert len(problems(read_dataset(folder))) == count


def test_image_and_label_of_one_grid_may_be_stored_in_different_orders(folder):
    path = folder / "labelsTr/case_1.nii.gz"
    label = nib.load(path)
    label = nib.Nifti1Image(np.asarray(label.dataobj).copy(), label.affine)
    nib.save(label.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]])), path)
    assert nib.load(path).shape != (6, 5, 4)
    assert problems(read_dataset(folder)) == []


def test_repeated_case_is_told(folder):
    dataset = json.loads((folder / "dataset.json").read_text())
    describe(folder, training=[*dataset["training"], dataset["training"][0]])
    assert problems(read_dataset(folder)) == ["case_0: listed 2 times in dataset.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": []}, "training: must list at least one case"),
        ({"training": ["a.nii.gz"]}, 'each case must have "image" and "label"'),
        (
            {"labels": {"0": "background", "2": "b"}},
            r"labels: ids are \['0', '2'\], must be 0 to 1",
        ),
        ({"labels": ["background", "a"]}, "labels: must be an object"),
        ({"modality": {}}, "modality: must be an object"),
    ],
)
def test_what_dataset_json_lacks_is_named(folder, changes, message):
    describe(folder, **changes)
    with pytest.raises(DataError, match=f"dataset.json: .*{message}"):
        read_dataset(folder)


def test_missing_and_broken_dataset_json(tmp_path):
    with pytest.raises(DataError, match=r"dataset.json: no such file"):
        read_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset.json: not readable as JSON"):
        read_dataset(tmp_path)


def test_split_depends_on_names_and_seed_alone(tmp_path):
    make_phantoms(tmp_path / "phantoms", 10, seed=0)
    cases = read_dataset(tmp_path / "phantoms").cases
    train, val = split(cases, 0.2, seed=0)
    assert (len(train), len(val)) == (8, 2)
    assert set(train) | set(val) == set(cases)
    assert split(cases[::-1], 0.2, seed=0) == (train, val)
    assert any(split(cases, 0.2, seed=s) != (train, val) for s in (1, 2, 3))
    with pytest.raises(DataError, match=r"val_fraction=0\.01: leaves 0 of 10 cases"):
        split(cases, 0.01, seed=0)


def test_real_decathlon_folder():
    folder = os.environ.get("UNETR_DECATHLON")
    if folder is None:
        pytest.skip("UNETR_DECATHLON does not name a folder in Decathlon layout")
    dataset = read_dataset(Path(folder))
    assert problems(dataset) == []
