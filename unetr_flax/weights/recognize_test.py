import dataclasses
from unittest import mock

import pytest

from unetr_flax.weights import CheckpointError
from unetr_flax.weights.families import FAMILIES
from unetr_flax.weights.recognize import locate, recognize

KEYS = {
    "reference": "transformer.layers.0.0.norm.weight",
    "monai": "vit.blocks.0.norm1.weight",
    "tamasino52": "transformer.layer.0.attention_norm.weight",
}


@pytest.mark.parametrize("prefix", ["", "module.", "_forward_module.", "a.b.unetr."])
@pytest.mark.parametrize("name", KEYS)
def test_every_family_is_found_behind_any_prefix(name, prefix):
    keys = [f"{prefix}decoder.weight", f"{prefix}{KEYS[name]}", f"{prefix}vit.norm.weight"]
    assert locate(keys) == (prefix, FAMILIES[name])


def test_a_signature_is_a_whole_name():
    assert locate(["my_vit.blocks.0.weight", "unit.transformer_layers.0.weight"]) is None


def test_a_signature_may_end_with_that_of_another_family():
    other = dataclasses.replace(FAMILIES["monai"], name="other", signature="enc.vit.blocks.")
    key = "module.enc.vit.blocks.0.weight"
    for first, second in ((FAMILIES, {"other": other}), ({"other": other}, FAMILIES)):
        with mock.patch.dict(FAMILIES, {**first, **second}, clear=True):
            assert locate([key]) == ("module.", other)


def test_what_is_no_known_model_behind_no_prefix_is_named():
    message = (
        r"not a known UNETR; keys must be like transformer\.layers\.\* \(reference\), "
        r"vit\.blocks\.\* \(monai\), .* but are like conv1\.weight, conv2\.weight, fc\.bias"
    )
    with pytest.raises(CheckpointError, match=message):
        recognize(["conv1.weight", "conv2.weight", "fc.bias", "fc.weight"])
    assert recognize([KEYS["monai"]]) is FAMILIES["monai"]
