import json

import pytest

from unetr_flax import UNETRConfig

SMALL = {"img_size": (32, 48, 16), "in_channels": 1, "out_channels": 3}


def test_presets_defaults_are_the_article_s():
    cfg = UNETRConfig.reference((128, 128, 128), 1, 4)
    assert cfg.patch_size == (16, 16, 16)
    assert (cfg.hidden_size, cfg.num_layers, cfg.num_heads, cfg.mlp_dim) == (768, 12, 8, 3072)
    assert cfg.skip_layers == (3, 6, 9, 12)
    assert cfg.channels == (16, 32, 64, 128)
    assert cfg.dropout_rate == 0
    assert cfg.num_patches == 512
    assert UNETRConfig.reference((224, 224, 224), 1, 4).num_patches == 2744


def test_survives_json():
    cfg = UNETRConfig.reference(**SMALL, patch_size=(16, 8, 2), light_r=2, dropout_rate=0.1)
    assert UNETRConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_from_dict_names_what_is_missing_and_unknown():
    values = UNETRConfig.reference(**SMALL).to_dict()
    values["depth"] = values.pop("num_layers")
    with pytest.raises(ValueError, match=r"missing fields \['num_layers'\].*\['depth'\]"):
        UNETRConfig.from_dict(values)


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        (1, (1, 1, 1, 1)),
        (2, (1, 1, 1, 2)),
        (4, (1, 1, 2, 2)),
        (8, (1, 2, 2, 2)),
        (16, (2, 2, 2, 2)),
    ],
)
def test_small_patches_are_not_upsampled_in_the_coarsest_stages(patch, strides):
    cfg = UNETRConfig.reference((16, 32), 1, 2, patch_size=(patch, 16))
    assert tuple(stage.strides for stage in cfg.decoder_stages) == tuple((s, 2) for s in strides)


def test_fractional_light_r_widens_and_narrows():
    assert UNETRConfig.reference(**SMALL, light_r=0.5).channels == (128, 256, 512, 1024)
    assert UNETRConfig.reference(**SMALL, light_r=3.2).channels == (20, 40, 80, 160)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (32, 40, 16)}, r"img_size=\(32, 40, 16\): each must be divisible"),
        ({"img_size": (32, 0, 16)}, "img_size=0: must be a positive integer"),
        ({"img_size": ()}, r"img_size=\(\): must be a sequence"),
        ({"img_size": 32}, "img_size=32: must be a sequence"),
        ({"img_size": "32"}, "img_size='32': must be a sequence"),
        ({"img_size": (32.0, 32, 16)}, "img_size=32.0: must be a positive integer"),
        ({"in_channels": 0}, "in_channels=0: must be a positive integer"),
        ({"out_channels": -1}, "out_channels=-1: must be a positive integer"),
        ({"out_channels": True}, "out_channels=True: must be a positive integer"),
        ({"hidden_size": 0}, "hidden_size=0: must be a positive integer"),
        ({"mlp_dim": 0}, "mlp_dim=0: must be a positive integer"),
        ({"num_layers": 0}, "num_layers=0: must be a positive integer"),
        ({"num_heads": 7}, "num_heads=7: must divide hidden_size=768"),
        ({"patch_size": 3}, r"patch_size=\(3, 3, 3\): each must be one of \(1, 2, 4, 8, 16\)"),
        ({"patch_size": (16, 16)}, r"patch_size=\(16, 16\): needs one size for each axis"),
        ({"light_r": 64}, "light_r=64: must be above 0, at most 32"),
        ({"light_r": 3}, "light_r=3: .* twice the one before"),
        ({"light_r": 0}, "light_r=0: must be above 0"),
        ({"light_r": float("nan")}, "light_r=nan: must be above 0"),
        ({"skip_layers": (3, 6, 9, 13)}, r"skip_layers=\(3, 6, 9, 13\): must be 4 increasing"),
        ({"skip_layers": (0, 6, 9, 12)}, "skip_layers=0: must be a positive integer"),
        ({"skip_layers": (3, 9, 6, 12)}, r"skip_layers=\(3, 9, 6, 12\): must be 4 increasing"),
        ({"skip_layers": (6, 9, 12)}, r"skip_layers=\(6, 9, 12\): must be 4 increasing"),
        ({"num_layers": 8, "skip_layers": (3, 6, 9, 12)}, "1 to num_layers=8"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0: must be in"),
        ({"dropout_rate": "a"}, "dropout_rate='a': must be in"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        UNETRConfig.reference(**{**SMALL, **options})


def test_monai_preset_is_monai_s():
    cfg = UNETRConfig.monai((96, 96, 64), 1, 14)
    assert (cfg.hidden_size, cfg.num_layers, cfg.num_heads, cfg.mlp_dim) == (768, 12, 12, 3072)
    assert cfg.skip_layers == (4, 7, 10, 12)
    assert cfg.channels == (16, 32, 64, 128)
    assert cfg.attention_scale == 1 / 8
    assert UNETRConfig.monai(96, 1, 2, spatial_dims=2).img_size == (96, 96)
    grouped = UNETRConfig.monai((32, 48), 1, 2, norm_name=("GROUP", {"num_groups": 4}))
    assert (grouped.norm, grouped.norm_groups, grouped.norm_affine) == ("group", 4, True)


def test_other_families_survive_json():
    for cfg in (
        UNETRConfig.monai((32, 48), 1, 2, norm_name=("group", {"num_groups": 4})),
        UNETRConfig.tamasino52((32, 48, 16), 4, 3, hidden_size=24, num_heads=3, width=8),
    ):
        assert UNETRConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (32, 40, 16)}, r"img_size=\(32, 40, 16\): each must be divisible"),
        ({"feature_size": 0}, "feature_size=0: must be a positive integer"),
        ({"proj_type": "pool"}, "proj_type='pool': must be 'conv' or 'perceptron'"),
        ({"norm_name": "layer"}, "norm_name='layer': must be 'instance' or 'batch' or 'group'"),
        ({"norm_name": "group"}, "norm_groups=None: must be a positive integer"),
        ({"norm_name": ("group", {"num_groups": 3})}, "norm_groups=3: must divide channels"),
        ({"norm_name": ("batch", {"eps": 1e-3})}, r"\['eps'\] cannot be given"),
        ({"norm_name": ("batch", {"num_groups": 4})}, r"\['num_groups'\] cannot be given"),
        ({"qkv_bias": 1}, "qkv_bias=1: must be True or False"),
        ({"conv_block": None}, "skip_convs=None: must be True or False"),
    ],
)
def test_what_monai_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        UNETRConfig.monai(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "swin"}, "family='swin': must be 'reference' or 'monai' or 'tamasino52'"),
        ({"block": "residual"}, "family='reference', block='residual': must be 'conv'"),
        ({"norm": "instance"}, "family='reference', norm='instance': must be 'batch'"),
        ({"qkv_bias": False}, "family='reference', qkv_bias=False: must be True"),
        ({"channels": (8, 16, 32)}, r"channels=\(8, 16, 32\): must be 4 widths, each twice"),
        ({"channels": (8, 16, 24, 48)}, r"channels=\(8, 16, 24, 48\): must be 4 widths"),
        ({"norm_groups": 4}, "norm_groups=4: must be None with norm=batch"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    values = UNETRConfig.reference(**SMALL).to_dict()
    with pytest.raises(ValueError, match=message):
        UNETRConfig.from_dict({**values, **changes})
