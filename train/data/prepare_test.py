import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

import train.data.prepare
from train.data.cache import PreparedCases
from train.data.cases import read_case
from train.data.dataset import BadCasesError, DataError
from train.data.headers import measure
from train.data.label_names import with_regions
from train.data.layouts import read_dataset
from train.data.prepare import _executor, prepare_cases
from train.data.preprocess import make_sample
from train.data.testing import (
    SHAPE,
    describe,
    overwrite,
    voxels_of,
    write_decathlon,
    write_metaimage,
)
from unetr_flax import Preprocessing
from unetr_flax.imaging.stored_voxels import StoredVoxels

PLAIN = Preprocessing.from_modalities(["MRI"])
FINE = Preprocessing.from_modalities(["MRI"], spacing=(0.5, 1.0, 2.0))


@pytest.fixture
def dataset(tmp_path):
    return read_dataset(write_decathlon(tmp_path / "data"))


@pytest.fixture
def read(monkeypatch):
    """Paths of the files whose voxels were read."""
    paths = []
    load = StoredVoxels.read
    monkeypatch.setattr(StoredVoxels, "read", lambda file: paths.append(file.path) or load(file))
    return paths


def prepare(dataset, folder, preprocessing=PLAIN, **options):
    need = measure(dataset, preprocessing)
    return prepare_cases(dataset, need, preprocessing, folder / "cache", **options)


def test_headers_are_parsed_by_one_thread_at_a_time(dataset, tmp_path, monkeypatch):
    samples = PreparedCases(prepare(dataset, tmp_path))
    load, inside, most = np.load, [], []

    def slowly(file, **options):
        inside.append(file)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return load(file, **options)

    monkeypatch.setattr(np, "load", slowly)
    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(samples.__getitem__, [0, 1, 2]))) == 3
    assert len(most) == 9
    assert max(most) == 1


@pytest.mark.parametrize("preprocessing", [PLAIN, FINE])
def test_prepared_cases_are_what_preprocessing_makes(dataset, tmp_path, preprocessing):
    prepared = prepare(dataset, tmp_path, preprocessing)
    samples = PreparedCases(prepared)
    assert len(samples) == 3
    for case, entry, sample in zip(dataset.cases, prepared, samples, strict=True):
        expected = make_sample(case.name, *read_case(dataset, case), preprocessing)
        assert (sample.name, sample.spacing) == (expected.name, expected.spacing)
        for name in ("image", "label", "foreground", "background"):
            np.testing.assert_array_equal(getattr(sample, name), getattr(expected, name))
        assert isinstance(sample.image, np.memmap)
        assert isinstance(sample.foreground, np.memmap)
        assert sample.image.dtype == np.float32
        assert sample.label.dtype == np.int8
        assert entry.shape == expected.label.shape
        assert entry.counts == tuple(np.bincount(expected.label.ravel(), minlength=3))


def test_every_file_is_read_once_whatever_runs_want_it(dataset, tmp_path, read):
    steps = []
    first = prepare(dataset, tmp_path, progress=lambda *step: steps.append(step))
    assert sorted(read) == sorted(path for case in dataset.cases for path in case.files)
    assert steps == [
        (f"{what} cases", i, 3) for what in ("checking", "preparing") for i in (1, 2, 3)
    ]
    read.clear()
    assert prepare(dataset, tmp_path) == first
    # The same files under another path are the same content.
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    moved = read_dataset(tmp_path / "moved")
    assert [c.folder for c in prepare(moved, tmp_path)] == [c.folder for c in first]
    assert read == []


def test_another_recipe_or_file_never_finds_what_is_stale(dataset, tmp_path):
    first = prepare(dataset, tmp_path)
    folders = {case.folder for case in first}
    assert folders.isdisjoint(case.folder for case in prepare(dataset, tmp_path, FINE))
    ignored = dataclasses.replace(dataset, ignored_id=2)
    others = prepare(ignored, tmp_path)
    assert folders.isdisjoint(case.folder for case in others)
    assert all(case.ignored for case in others)
    assert not any(case.counts[2] for case in others)
    # Ids that one run knows may be undeclared in another.
    region = with_regions(dataset, ("posterior=2",))
    prepare(region, tmp_path)
    with pytest.raises(BadCasesError, match=r"label ids \[1\], declared are 0, 2"):
        prepare(dataclasses.replace(region, unused_ids=()), tmp_path)

    def change(array):
        array[0, 0, 0] += 1
        return array

    before = os.stat(dataset.cases[1].images[0])
    overwrite(dataset.cases[1].images[0], change)
    os.utime(dataset.cases[1].images[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = prepare(dataset, tmp_path)
    assert [a == b for a, b in zip(first, changed, strict=True)] == [True, False, True]


def test_voxels_beside_their_header_are_part_of_what_is_cached(tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, SHAPE)
    image, label = (write_metaimage(tmp_path / name, labels) for name in ("i.mhd", "l.mhd"))
    names = {"0": "background", "1": "anterior", "2": "posterior"}
    training = [{"image": image.name, "label": label.name}]
    describe(tmp_path, name="Test", modality={"0": "MRI"}, labels=names, training=training)
    dataset = read_dataset(tmp_path)
    need = measure(dataset, PLAIN)
    files = [image, voxels_of(image), label, voxels_of(label)]
    assert need.file_bytes == sum(map(os.path.getsize, files))
    prepare(dataset, tmp_path)
    voxels_of(label).write_bytes((2 - labels).astype(np.uint8).tobytes(order="F"))
    (sample,) = PreparedCases(prepare(dataset, tmp_path))
    # MetaImage counts to the left and to the back.
    np.testing.assert_array_equal(sample.label, (2 - labels)[::-1, ::-1])
    voxels_of(image).unlink()
    with pytest.raises(BadCasesError, match=r"i\.raw: no such file"):
        prepare(dataset, tmp_path)


@pytest.mark.parametrize("file", ["image.npy", "label.npy", "foreground.npy", "case.json"])
def test_a_damaged_entry_is_prepared_again(dataset, tmp_path, read, file):
    first = prepare(dataset, tmp_path)
    path = first[1].folder / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    read.clear()
    assert prepare(dataset, tmp_path) == first
    assert sorted(read) == sorted(dataset.cases[1].files)
    path.unlink()
    assert prepare(dataset, tmp_path) == first
    read.clear()
    prepare(dataset, tmp_path)
    assert read == []


def test_what_was_prepared_before_a_failure_is_kept(dataset, tmp_path, read):
    label = dataset.cases[1].label
    good = label.read_bytes()
    label.write_bytes(good[:60])
    with pytest.raises(BadCasesError, match=r"^\S+labelsTr/case_1\.nii\.gz: not a readable NIfTI"):
        prepare(dataset, tmp_path)
    label.write_bytes(good)
    read.clear()
    prepare(dataset, tmp_path)
    assert sorted(read) == sorted(dataset.cases[1].files)


def test_all_bad_files_are_named_at_once(dataset, tmp_path):
    for case in dataset.cases[:2]:
        case.label.unlink()
    with pytest.raises(BadCasesError) as error:
        prepare(dataset, tmp_path)
    assert str(error.value).splitlines() == [f"{c.label}: no such file" for c in dataset.cases[:2]]


def test_two_runs_may_prepare_the_same_cases_at_the_same_time(dataset, tmp_path, monkeypatch):
    barrier = threading.Barrier(2)
    find = train.data.prepare._check_disk
    monkeypatch.setattr(
        train.data.prepare, "_check_disk", lambda *args: (barrier.wait(10), find(*args))
    )
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(prepare, dataset, tmp_path) for _ in range(2)]
        first, second = (run.result() for run in runs)
    assert first == second
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def test_what_killed_processes_left_is_removed(dataset, tmp_path):
    old, new = (tmp_path / "cache" / f".{name}.tmp" for name in ("1.old", "2.new"))
    for folder in (old, new):
        (folder / "x").mkdir(parents=True)
    os.utime(old, (0, 0))
    prepare(dataset, tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    dataset, tmp_path, monkeypatch
):
    disk = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    with pytest.raises(DataError, match=r"1 kB are free, the prepared cases need up to 1\.8 kB; "):
        prepare(dataset, tmp_path)


def test_large_data_are_prepared_by_processes(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train.data.prepare, "BYTES_FOR_PROCESSES", 0)
    dataset.cases[2].label.unlink()
    with pytest.raises(BadCasesError, match=r"case_2\.nii\.gz: no such file"):
        prepare(dataset, tmp_path, workers=1)
    good = dataclasses.replace(dataset, cases=dataset.cases[:2])
    assert [case.name for case in prepare(good, tmp_path, workers=1)] == ["case_0", "case_1"]


@pytest.mark.parametrize(
    ("file_bytes", "prepared_bytes", "kind"),
    [
        (4e6, 63e6, ThreadPoolExecutor),
        # Compressed a thousandfold.
        (4e6, 2e9, ProcessPoolExecutor),
        # Resampled to few voxels.
        (2e9, 63e6, ProcessPoolExecutor),
    ],
)
def test_what_is_large_in_files_or_prepared_goes_to_processes(
    file_bytes, prepared_bytes, kind, dataset
):
    sizes = {"file_bytes": int(file_bytes), "prepared_bytes": int(prepared_bytes)}
    need = dataclasses.replace(measure(dataset, PLAIN), **sizes)
    with _executor(need, 1) as executor:
        assert type(executor) is kind


def test_headers_tell_the_size_before_anything_is_read(dataset, tmp_path, read):
    need = measure(dataset, FINE)
    assert need.largest_shape == (12, 5, 2)
    assert need.prepared_bytes == 3 * 12 * 5 * 2 * 5
    with pytest.raises(BadCasesError, match=r"case_0\.nii\.gz: 6 x 5 x 4 voxels .* --spacing must"):
        measure(dataset, Preprocessing.from_modalities(["MRI"], spacing=(0.001, 0.001, 0.001)))
    assert read == []


def test_processes_that_prepare_import_no_jax():
    command = "import sys, train.data.prepare; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert run.stdout == "False\n"
