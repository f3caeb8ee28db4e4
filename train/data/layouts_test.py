import json
import os
from pathlib import Path

import numpy as np
import pytest

from train.data.cases import read_case
from train.data.dataset import DataError
from train.data.layouts import read_dataset
from train.data.testing import describe, write, write_decathlon, write_image, write_label


@pytest.fixture
def folder(tmp_path):
    return write_decathlon(tmp_path)


def names(dataset):
    return [case.name for case in dataset.cases]


def relative(case, folder):
    return [path.relative_to(folder).as_posix() for path in case.files]


def check(dataset):
    """Reads every case, which raises if one is bad."""
    for case in dataset.cases:
        read_case(dataset, case)


def test_decathlon_as_real_folders_have_it(folder):
    dataset = read_dataset(folder)
    assert dataset.name == "Test"
    assert dataset.modalities == ("MRI",)
    assert dataset.labels == ("background", "anterior", "posterior")
    assert names(dataset) == ["case_0", "case_1", "case_2"]
    assert relative(dataset.cases[0], folder) == [
        "imagesTr/case_0.nii.gz",
        "labelsTr/case_0.nii.gz",
    ]
    assert (dataset.target, dataset.ignored_id, dataset.num_outputs) == ("classes", 255, 3)
    check(dataset)
    # The JSON file itself may be given, under any name.
    (folder / "dataset.json").rename(folder / "dataset_0.json")
    assert read_dataset(folder / "dataset_0.json") == dataset
    assert read_dataset(folder) == dataset


def test_a_case_is_known_by_its_path(tmp_path):
    training = []
    for i in range(3):
        write_image(tmp_path / f"p{i}/image.nii.gz", i)
        write_label(tmp_path / f"p{i}/label.nii.gz", i)
        training.append({"image": f"p{i}/image.nii.gz", "label": f"p{i}/label.nii.gz"})
    content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a", "2": "b"}}
    describe(tmp_path, training=training, **content)
    dataset = read_dataset(tmp_path)
    assert names(dataset) == ["p0/image", "p1/image", "p2/image"]
    check(dataset)
    # The same file by another way to write its path.
    describe(tmp_path, training=[*training, training[0] | {"image": "p1/../p0/image.nii.gz"}])
    with pytest.raises(DataError, match=r"p0/image\.nii\.gz is listed 2 times$"):
        read_dataset(tmp_path)


def test_a_list_of_monai_with_files_per_channel_and_cases_for_validation(tmp_path):
    entries = []
    for i in range(4):
        for channel in ("flair", "t1"):
            write_image(tmp_path / f"p{i}_{channel}.nii.gz", i)
        write_label(tmp_path / f"p{i}_seg.nii.gz", i, classes=2)
        images = [f"p{i}_flair.nii.gz", f"p{i}_t1.nii.gz"]
        entries.append({"fold": 0, "image": images, "label": f"p{i}_seg.nii.gz"})
    describe(
        tmp_path,
        modality={"0": "FLAIR", "1": "T1"},
        labels={"0": "background", "1": "tumor"},
        training=entries[1:],
        validation=entries[:1],
    )
    dataset = read_dataset(tmp_path)
    assert names(dataset) == [f"p{i}_flair" for i in range(4)]
    assert relative(dataset.cases[2], tmp_path) == [
        "p2_flair.nii.gz",
        "p2_t1.nii.gz",
        "p2_seg.nii.gz",
    ]
    assert dataset.validation == dataset.cases[:1]
    check(dataset)
    describe(tmp_path, validation=entries[1:2])
    with pytest.raises(DataError, match=r"p1_flair\.nii\.gz is listed 2 times"):
        read_dataset(tmp_path)


def write_nnunet(folder, ending=".nii.gz", **changes):
    for i in range(3):
        for channel in range(2):
            write_image(folder / f"imagesTr/c{i}_{channel:04d}{ending}", i)
        write_label(folder / f"labelsTr/c{i}{ending}", i)
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 3,
        "file_ending": ending,
    }
    describe(folder, **content | changes)


def test_nnunet(tmp_path):
    write_nnunet(tmp_path)
    dataset = read_dataset(tmp_path)
    assert dataset.modalities == ("T1", "T2")
    assert dataset.labels == ("background", "a", "b")
    assert names(dataset) == ["c0", "c1", "c2"]
    assert relative(dataset.cases[1], tmp_path) == [
        "imagesTr/c1_0000.nii.gz",
        "imagesTr/c1_0001.nii.gz",
        "labelsTr/c1.nii.gz",
    ]
    check(dataset)
    # An image without a label map is a case too, and reading it says what is missing.
    write_image(tmp_path / "imagesTr/c9_0000.nii.gz")
    assert names(read_dataset(tmp_path)) == ["c0", "c1", "c2", "c9"]


def test_nnunet_with_regions_an_ignored_label_and_a_list_of_files(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "Ignore": 3}
    listed = {"x": {"images": ["imagesTr/c0_0000.nii.gz"], "label": "labelsTr/c0.nii.gz"}}
    fields = {"channel_names": {"0": "CT"}, "regions_class_order": [1, 2]}
    write_nnunet(tmp_path, labels=labels, dataset=listed, **fields)
    dataset = read_dataset(tmp_path)
    assert dataset.labels == ("background", "whole", "core")
    assert (dataset.target, dataset.regions) == ("regions", ((1, 2), (2,)))
    assert dataset.regions_class_order == (1, 2)
    assert (dataset.ignored_id, dataset.num_outputs) == (3, 2)
    assert names(dataset) == ["x"]
    check(dataset)


def test_nnunet_with_endings(tmp_path):
    write_nnunet(tmp_path, ending=".nii")
    check(read_dataset(tmp_path))
    describe(tmp_path, file_ending=".png")
    with pytest.raises(DataError, match=r"file_ending: '\.png', must be one of \.nii, \.nii\.gz"):
        read_dataset(tmp_path)


def test_plain_folders(tmp_path):
    for name in ("a", "deep/b"):
        write_image(tmp_path / f"images/{name}.nii.gz")
        write_label(tmp_path / f"labels/{name}.nii", classes=3)
    with pytest.raises(DataError, match=r"has no JSON file .* add --modalities CT"):
        read_dataset(tmp_path)
    dataset = read_dataset(tmp_path, ("CT",))
    assert names(dataset) == ["a", "deep/b"]
    assert dataset.labels == ("background", "label 1", "label 2")
    check(dataset)
    (tmp_path / "labels.json").write_text('{"background": 0, "liver": 1, "spleen": 2}')
    assert read_dataset(tmp_path, ("CT",)).labels == ("background", "liver", "spleen")
    write_image(tmp_path / "images/c.nii.gz")
    with pytest.raises(DataError, match=r"images/c\.nii\.gz: there is no label map in"):
        read_dataset(tmp_path, ("CT",))
    (tmp_path / "images/c.nii.gz").unlink()
    (tmp_path / "images/a.nii.gz").unlink()
    with pytest.raises(DataError, match=r"labels/a\.nii: there is no image"):
        read_dataset(tmp_path, ("CT",))


def test_plain_folders_with_a_file_per_channel(tmp_path):
    for channel in range(2):
        write_image(tmp_path / f"images/a_{channel:04d}.nii.gz")
    write(tmp_path / "labels/a.nii.gz", np.full((6, 5, 4), 255, np.uint8))
    with pytest.raises(DataError, match="hold no id but 0 and 255, which marks voxels that do not"):
        read_dataset(tmp_path, ("T1", "T2"))
    write_label(tmp_path / "labels/a.nii.gz")
    dataset = read_dataset(tmp_path, ("T1", "T2"))
    assert relative(dataset.cases[0], tmp_path) == [
        "images/a_0000.nii.gz",
        "images/a_0001.nii.gz",
        "labels/a.nii.gz",
    ]
    check(dataset)


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("dataset_fingerprint.json", "is preprocessed by nnU-Net; give the raw folder"),
        ("Dataset004_Hippocampus/x", "holds several data sets of nnU-Net; give one of them"),
        ("Task04_Hippocampus/x", "holds several tasks of the Decathlon; give one of them"),
        ("dataset_description.json", "is a BIDS data set; write a dataset.json"),
        ("s1/segmentations/a.nii.gz", "has one mask per structure as TotalSegmentator's data"),
        ("case_1/imaging.nii.gz", "is in the layout of KiTS; write a dataset.json"),
        ("p1/p1_seg.nii.gz", "is in the layout of BraTS; write a dataset.json"),
        ("imagesTr/x.nii.gz", "has images but no folder of label maps beside them"),
        ("a/1.dcm", "holds DICOM files; convert images and segmentations to NIfTI"),
        ("a.nii.gz", "holds volumes without an order"),
        ("readme.txt", "holds no data set; --data must hold dataset.json of the Decathlon"),
    ],
)
def test_a_neighboring_layout_is_named_with_what_to_do(tmp_path, file, advice):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(DataError) as error:
        read_dataset(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: {advice}")
    assert "\n" not in str(error.value)


def test_the_first_nnunet_is_named(folder):
    for i in range(3):
        name = f"imagesTr/case_{i}"
        (folder / f"{name}.nii.gz").rename(folder / f"{name}_0000.nii.gz")
    with pytest.raises(DataError, match="is in the layout of nnU-Net version 1"):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": []}, "training: must list at least one case"),
        ({"training": ["a.nii.gz"]}, 'each case must have "image" and "label"'),
        ({"training": [{"image": [], "label": "a"}]}, '"image" must be a file or a list of files'),
        ({"training": {}}, "training: must be a list of cases"),
        (
            {"labels": {"0": "background", "2": "b"}},
            r"labels: ids are \['0', '2'\], must be 0 to 1",
        ),
        ({"labels": ["background", "a"]}, "labels: must be an object"),
        ({"labels": {"1": "a"}}, 'labels: none has the id 0, .* add "0": "background"'),
        ({"labels": {"0": "a"}}, "labels: 'a' with the id 0 is the background, and there is no"),
        ({"labels": {"background": 0, "a": "x"}}, "labels: a: must be an id or a list of ids"),
        ({"modality": {}}, "modality: must be an object"),
        ({"modality": {"1": "CT"}}, r"modality: ids are \['1'\], must be 0 to 0"),
    ],
)
def test_what_dataset_json_lacks_is_named(folder, changes, message):
    describe(folder, **changes)
    with pytest.raises(DataError, match=f"dataset.json: .*{message}"):
        read_dataset(folder)


def test_names_of_channels_may_be_given(folder):
    describe(folder, modality=None)
    assert read_dataset(folder, ("CT",)).modalities == ("CT",)


def test_missing_and_broken_json(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder; --data must hold"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"list\.json: no such file"):
        read_dataset(tmp_path / "list.json")
    for content in ("{", "[" * 100_000):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(DataError, match=r"dataset.json: not readable as JSON"):
            read_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"tr": []}))
    with pytest.raises(DataError, match=r'lists no cases under "training"'):
        read_dataset(tmp_path)


def test_real_decathlon_folder():
    folder = os.environ.get("UNETR_DECATHLON")
    if folder is None:
        pytest.skip("UNETR_DECATHLON does not name a folder in Decathlon layout")
    check(read_dataset(Path(folder)))
