import numpy as np
import pytest

from unetr_flax import UNETRConfig
from unetr_flax.weights.unused_keys import known_unused, unused_keys

MONAI = UNETRConfig.monai((32, 16, 48), 2, 3, feature_size=8, hidden_size=24, num_heads=4)


def total(arrays):
    return sum(array.size for array in arrays.values())


def test_cross_attention_of_1_4_and_1_5_is_as_large_as_it_was_there():
    cfg = UNETRConfig.monai((96, 96, 96), 1, 14)
    assert unused_keys(cfg, "1.4").keys() == unused_keys(cfg, "1.5.1").keys()
    assert len(unused_keys(cfg, "1.5")) == 84
    assert total(unused_keys(cfg, "1.5")) == 28_339_200


def test_1_6_and_the_default_keep_only_the_norm():
    assert unused_keys(MONAI).keys() == unused_keys(MONAI, "1.6").keys()
    assert len(unused_keys(MONAI)) == 24
    assert all("norm_cross_attn" in key for key in unused_keys(MONAI))


def test_the_first_versions_had_class_tokens_and_idle_shortcuts():
    assert set(unused_keys(MONAI, "0.7")) == {
        "vit.patch_embedding.cls_token",
        "encoder2.blocks.0.1.conv3.conv.weight",
        "encoder2.blocks.1.1.conv3.conv.weight",
        "encoder3.blocks.0.1.conv3.conv.weight",
    }
    assert unused_keys(MONAI, "0.9") == unused_keys(MONAI, "1.3.2") == {}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"in_channels": 8}, 5),
        ({"norm_name": "batch"}, 19),
        ({"norm_name": ("batch", {"affine": False})}, 13),
        ({"norm_name": ("instance", {"affine": True})}, 10),
        ({"res_block": False}, 1),
        ({"conv_block": False}, 1),
        ({"conv_block": False, "in_channels": 8}, 2),
    ],
)
def test_idle_shortcuts_follow_the_options(options, count):
    options = {"in_channels": 2, **options}
    cfg = UNETRConfig.monai((32, 16, 48), out_channels=3, feature_size=8, **options)
    assert len(unused_keys(cfg, "0.8")) == count


def test_arrays_are_identities():
    arrays = unused_keys(MONAI, "0.7")
    kernel = arrays["encoder3.blocks.0.1.conv3.conv.weight"]
    assert kernel.shape == (32, 32, 1, 1, 1)
    np.testing.assert_array_equal(kernel[..., 0, 0, 0], np.eye(32))
    cross = unused_keys(MONAI, "1.5")
    np.testing.assert_array_equal(cross["vit.blocks.3.cross_attn.to_q.weight"], np.eye(24))
    assert "vit.blocks.3.cross_attn.to_q.bias" not in cross


def test_known_unused_is_all_of_them():
    unused = known_unused(MONAI)
    for version in ("0.7", "1.3", "1.4", "1.6"):
        assert unused_keys(MONAI, version).keys() <= unused
    tamasino52 = UNETRConfig.tamasino52((32, 16, 48), 2, 3)
    assert known_unused(tamasino52) == {
        "transformer.encoder_norm.weight",
        "transformer.encoder_norm.bias",
    }
    assert known_unused(UNETRConfig.reference((32, 16, 48), 2, 3)) == set()


@pytest.mark.parametrize("version", ["latest", "1", "0.6"])
def test_versions_must_be_monai_s(version):
    with pytest.raises(ValueError, match=f"version '?{version}'?: must be"):
        unused_keys(MONAI, version)


def test_other_families_have_no_versions():
    with pytest.raises(ValueError, match="family 'reference' has no versions"):
        unused_keys(UNETRConfig.reference((32, 16, 48), 2, 3), "1.6")
