import fractions
import itertools

import pytest
import torch
from torch import nn

from unetr_torch_ref import UNETR

SMALL = {
    "img_shape": (8, 16, 4),
    "input_dim": 2,
    "output_dim": 3,
    "embed_dim": 12,
    "patch_size": (4, 8, 2),
    "num_heads": 3,
    "dropout": 0.0,
    "light_r": 16,
    "num_layers": 4,
    "ext_layers": (1, 2, 3, 4),
}


def small(**changes):
    torch.manual_seed(0)
    return UNETR(**{**SMALL, **changes}).eval()


def image(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 8, 16, 4, generator=generator, dtype=dtype)


@pytest.fixture(scope="module")
def article_model():
    with torch.device("meta"):
        return UNETR((128, 128, 128), input_dim=1, output_dim=4, dropout=0.0, light_r=4)


def test_counts_of_the_article(article_model):
    parameters = dict(article_model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == 92_459_028
    positions = parameters["embedding.position_embeddings"]
    assert positions.shape == (1, 512, 768)
    assert 92_459_028 - positions.numel() == 92_065_812


def test_shapes_of_the_article(article_model):
    x = torch.empty(1, 1, 128, 128, 128, device="meta")
    assert article_model(x).shape == (1, 4, 128, 128, 128)
    with torch.device("meta"):
        features = UNETR().encode(torch.empty(1, 3, 224, 224, 224))
    assert [tuple(z.shape) for z in features] == [(1, 2744, 768)] * 4


def test_defaults_of_the_article():
    with torch.device("meta"):
        model = UNETR()
    assert (model.img_shape, model.input_dim, model.output_dim) == ((224, 224, 224), 3, 3)
    assert (model.embed_dim, model.patch_size, model.num_heads) == (768, (16, 16, 16), 8)
    assert (model.num_layers, model.ext_layers, model.dropout) == (12, (3, 6, 9, 12), 0.1)
    assert model.conv_channels == [8, 16, 32, 64, 128, 256]


NAMES_AND_SHAPES = {
    "embedding.patch_embeddings.weight": (768, 1, 16, 16, 16),
    "embedding.position_embeddings": (1, 512, 768),
    "transformer.layers.{i}.0.norm.weight": (768,),
    "transformer.layers.{i}.0.fn.qkv.weight": (2304, 768),
    "transformer.layers.{i}.0.fn.projection.weight": (768, 768),
    "transformer.layers.{i}.1.norm.weight": (768,),
    "transformer.layers.{i}.1.fn.0.weight": (3072, 768),
    "transformer.layers.{i}.1.fn.3.weight": (768, 3072),
    "decoder0.0.block.0.block.weight": (8, 1, 3, 3, 3),
    "decoder0.0.block.1.running_mean": (8,),
    "decoder0.1.block.0.block.weight": (16, 8, 3, 3, 3),
    "decoder3.0.block.0.block.weight": (768, 32, 2, 2, 2),
    "decoder3.0.block.1.block.weight": (32, 32, 3, 3, 3),
    "decoder3.0.block.2.weight": (32,),
    "decoder3.0.block.2.running_var": (32,),
    "decoder6.1.block.0.block.weight": (64, 64, 2, 2, 2),
    "decoder9.block.0.block.weight": (768, 128, 2, 2, 2),
    "decoder12_upsampler.block.weight": (768, 128, 2, 2, 2),
    "decoder9_upsampler.0.block.0.block.weight": (64, 256, 3, 3, 3),
    "decoder9_upsampler.3.block.weight": (64, 64, 2, 2, 2),
    "decoder6_upsampler.2.block.weight": (32, 32, 2, 2, 2),
    "decoder3_upsampler.2.block.weight": (16, 16, 2, 2, 2),
    "decoder0_header.2.block.weight": (4, 16, 1, 1, 1),
}


def test_names_and_shapes_of_the_state_dict(article_model):
    shapes = {name: tuple(value.shape) for name, value in article_model.state_dict().items()}
    for pattern, shape in NAMES_AND_SHAPES.items():
        for i in range(12 if "{i}" in pattern else 1):
            assert shapes[pattern.format(i=i)] == shape
    assert "transformer.layers.12.0.norm.weight" not in shapes


@pytest.mark.parametrize("patch", [1, 2, 4, 8, 16])
def test_every_patch_size_on_every_axis_gives_logits_of_the_image_size(patch):
    for patches in (patch, (patch, 1, 16), (2, patch, 8), (16, 4, patch)):
        per_axis = patches if isinstance(patches, tuple) else (patches,) * 3
        img_shape = tuple(p * n for p, n in zip(per_axis, (2, 1, 3), strict=True))
        with torch.device("meta"):
            model = small(img_shape=img_shape, patch_size=patches)
            x = torch.empty(2, 2, *img_shape)
            assert model(x).shape == (2, 3, *img_shape)
            assert [tuple(z.shape) for z in model.encode(x)] == [(2, 6, 12)] * 4
        assert model.patch_size == per_axis


def test_small_patches_are_not_upsampled_at_the_coarsest_levels():
    model = small(img_shape=(1, 2, 16), patch_size=(1, 2, 16))
    levels = [
        [model.decoder12_upsampler, model.decoder9, model.decoder6[0], model.decoder3[0]],
        [model.decoder9_upsampler[3], model.decoder6[1], model.decoder3[1]],
        [model.decoder6_upsampler[2], model.decoder3[2]],
        [model.decoder3_upsampler[2]],
    ]
    expected = [(1, 1, 2), (1, 1, 2), (1, 1, 2), (1, 2, 2)]
    for towers, stride in zip(levels, expected, strict=True):
        for tower in towers:
            deconv = [m for m in tower.modules() if isinstance(m, nn.ConvTranspose3d)]
            assert [(m.kernel_size, m.stride) for m in deconv] == [(stride, stride)]


@pytest.mark.parametrize(
    ("skip", "up", "joined"),
    [
        ("decoder9", "decoder12_upsampler", "decoder9_upsampler"),
        ("decoder6", "decoder9_upsampler", "decoder6_upsampler"),
        ("decoder3", "decoder6_upsampler", "decoder3_upsampler"),
        ("decoder0", "decoder3_upsampler", "decoder0_header"),
    ],
)
def test_joins_put_the_skip_first(skip, up, joined):
    model = small()
    seen = {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
    model(image())
    assert torch.equal(seen[joined][0], torch.cat([seen[skip][1], seen[up][1]], dim=1))


def test_decoders_get_their_features_on_the_grid_of_patches():
    model = small()
    seen = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0]}))
    model(image())
    names = ("decoder3", "decoder6", "decoder9", "decoder12_upsampler")
    for name, z in zip(names, model.encode(image()), strict=True):
        for n, (i, j, k) in enumerate(itertools.product(range(2), range(2), range(2))):
            assert torch.equal(seen[name][:, :, i, j, k], z[:, n])
    assert torch.equal(seen["decoder0"], image())


def test_features_are_those_after_ext_layers():
    every = small().encode(image())
    model = small(num_layers=5, ext_layers=(1, 2, 4, 5))
    model.load_state_dict(small().state_dict(), strict=False)
    some = model.encode(image())
    assert torch.equal(some[1], every[1])
    assert torch.equal(some[2], every[3])


def test_mask_reaches_the_features_and_the_logits():
    model = small().double()
    x, changed = image(dtype=torch.float64), image(dtype=torch.float64)
    changed[:, :, 4:, :8, :2] += 10  # the patch of token 4
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    mask[..., 4] = False
    others = [0, 1, 2, 3, 5, 6, 7]
    for z, z_changed in zip(model.encode(x, mask), model.encode(changed, mask), strict=True):
        assert torch.equal(z[:, others], z_changed[:, others])
    seen = []
    model.transformer.register_forward_hook(lambda _, args, out: seen.append(out))
    model(x, mask)
    for z, z_unmasked, z_in_forward in zip(
        model.encode(x, mask), model.encode(x), seen[0], strict=True
    ):
        assert torch.equal(z_in_forward, z)
        assert not torch.allclose(z, z_unmasked)


@pytest.mark.parametrize("place", ["embedding", "att_drop", "fn.2"])
def test_dropout_acts_in_training_at_each_of_its_places(place):
    model = small(dropout=0.5)
    dropouts = {n: m for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert len(dropouts) == 1 + 2 * SMALL["num_layers"]
    assert all(m.p == 0.5 for m in dropouts.values())
    for name, module in dropouts.items():
        module.p = 0.5 if place in name else 0.0
    expected = small().encode(image())
    for z, z_expected in zip(model.encode(image()), expected, strict=True):
        assert torch.equal(z, z_expected)
    model.train()
    assert not torch.allclose(model.encode(image())[0], expected[0])
    assert not torch.equal(model.encode(image())[0], model.encode(image())[0])


def test_float64_gradients_reach_every_parameter():
    model = small().double().train()
    logits = model(image(dtype=torch.float64))
    assert logits.dtype == torch.float64
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_mlp_dim_and_exact_light_r():
    assert small(mlp_dim=7).transformer.layers[3][1].fn[0].out_features == 7
    assert small().transformer.layers[3][1].fn[0].out_features == 48
    # Widths of 3 x 2**k need exact division: int(64 / light_r) of a float could be one less.
    assert small(light_r=fractions.Fraction(64, 6)).conv_channels == [3, 6, 12, 24, 48, 96]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"img_shape": (8, 12, 4)},
            r"img_shape=\(8, 12, 4\): .* multiple of its patch_size=\(4, 8",
        ),
        ({"img_shape": (8, 0, 4)}, r"img_shape=\(8, 0, 4\): .* positive multiple"),
        ({"img_shape": (8, 16)}, r"img_shape=\(8, 16\): must be three sizes"),
        (
            {"patch_size": (4, 8)},
            r"patch_size=\(4, 8\): must be .* or one per axis",
        ),
        ({"patch_size": 0}, r"patch_size=0: must be one positive number"),
        (
            {"img_shape": (6, 3, 3), "patch_size": 3},
            r"patch_size=\(3, 3, 3\): .* \(1, 2, 4, 8, 16\)",
        ),
        ({"patch_size": 32}, r"patch_size=\(32, 32, 32\): each must be one of \(1, 2, 4, 8, 16\)"),
        ({"num_heads": 5}, r"num_heads=5: must divide the embedding size 12"),
        ({"num_heads": 0}, r"num_heads=0: must be a positive integer"),
        ({"embed_dim": 12.0}, r"embed_dim=12.0: must be a positive integer"),
        ({"output_dim": 0}, r"output_dim=0: must be a positive integer"),
        ({"light_r": 64}, r"light_r=64: must be above 0, at most 32"),
        ({"light_r": 3}, r"light_r=3: .* twice the one before"),
        ({"light_r": 0}, r"light_r=0: must be above 0"),
        ({"light_r": float("nan")}, r"light_r=nan: must be above 0"),
        ({"ext_layers": (1, 2, 3, 5)}, r"ext_layers=\(1, 2, 3, 5\): must be 4 .* num_layers=4"),
        ({"ext_layers": (0, 1, 2, 3)}, r"ext_layers=\(0, 1, 2, 3\): must be 4 increasing numbers"),
        ({"ext_layers": (1, 1, 2, 3)}, r"ext_layers=\(1, 1, 2, 3\): must be 4 increasing numbers"),
        ({"ext_layers": (1, 2, 3)}, r"ext_layers=\(1, 2, 3\): must be 4 increasing numbers"),
        ({"ext_layers": ()}, r"ext_layers=\(\): must be 4 increasing numbers"),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(changes, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize("shape", [(2, 2, 16, 8, 4), (2, 1, 8, 16, 4), (2, 8, 16, 4)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x: shape .* must be \(batch, 2, 8, 16, 4\)"):
        small()(torch.zeros(shape))
