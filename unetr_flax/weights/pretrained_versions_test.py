"""Model folders that earlier versions wrote."""

import pytest
import safetensors.numpy

from unetr_flax import Preprocessing
from unetr_flax.imaging.intensity import Percentiles, Window
from unetr_flax.weights import (
    load_pretrained,
    read_metadata,
    save_pretrained,
)
from unetr_flax.weights.testing import (
    CFG,
    VARIABLES,
    assert_same,
    flat,
    read_raw,
)

# The header that training wrote in version 1, literally.
VERSION_1 = """{"format": "unetr_flax", "version": 1, \
"config": {"family": "reference", "img_size": [16, 32, 16], "in_channels": 1, "out_channels": 2, \
"patch_size": [16, 16, 16], "proj_type": "conv", "hidden_size": 8, "num_layers": 4, \
"num_heads": 2, "mlp_dim": 32, "qkv_bias": true, "skip_layers": [1, 2, 3, 4], \
"channels": [4, 8, 16, 32], "skip_convs": true, "block": "conv", "norm": "batch", \
"norm_groups": null, "norm_affine": true, "dropout_rate": 0.0}, \
"preprocessing": {"modalities": ["CT"], "spacing": [1.5, 1.5, 3.0], \
"labels": ["background", "box"]}, \
"provenance": {"dataset": "Boxes", "fingerprint": "0", "step": 12}}"""
VERSION_1_PREPROCESSING = (
    '{"modalities": ["CT"], "spacing": [1.5, 1.5, 3.0], "labels": ["background", "box"]}'
)


def write_version_1(folder, preprocessing=VERSION_1_PREPROCESSING):
    assert VERSION_1_PREPROCESSING in VERSION_1
    text = VERSION_1.replace(VERSION_1_PREPROCESSING, preprocessing)
    leaves = flat(VARIABLES)
    safetensors.numpy.save_file(leaves, folder / "model.safetensors", {"unetr_flax": text})
    (folder / "config.json").write_text(text)


def test_a_folder_of_version_1_loads_with_the_rules_of_then(tmp_path):
    write_version_1(tmp_path)
    cfg, variables = load_pretrained(tmp_path)
    assert cfg == CFG
    assert_same(variables, VARIABLES)
    metadata = read_metadata(tmp_path)
    assert metadata["preprocessing"] == Preprocessing(
        ("CT",), (Window(-175, 250),), ("background", "box"), spacing=(1.5, 1.5, 3)
    )
    assert metadata["provenance"] == {"dataset": "Boxes", "fingerprint": "0", "step": 12}
    # The folder has the current version after the model is saved again.
    save_pretrained(tmp_path, cfg, variables, preprocessing=metadata["preprocessing"])
    assert read_raw(tmp_path)["version"] == 2
    assert read_metadata(tmp_path)["preprocessing"] == metadata["preprocessing"]


def test_version_1_normalized_everything_but_ct_as_mri(tmp_path):
    write_version_1(tmp_path, '{"modalities": ["T2"], "spacing": null, "labels": ["0", "1"]}')
    preprocessing = read_metadata(tmp_path)["preprocessing"]
    assert preprocessing == Preprocessing(("T2",), (Percentiles(0.5, 99.5),), ("0", "1"))


@pytest.mark.parametrize("text", ["null", '"z-score"', '{"window": [-175.0, 250.0]}'])
def test_other_text_of_version_1_is_no_preprocessing(tmp_path, text):
    write_version_1(tmp_path, text)
    assert read_metadata(tmp_path)["preprocessing"] is None
    assert load_pretrained(tmp_path)[0] == CFG
