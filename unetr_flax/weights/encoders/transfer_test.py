import functools

import jax
import numpy as np
import pytest

from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.model.encoder import VisionTransformer
from unetr_flax.weights import CheckpointError, to_torch
from unetr_flax.weights.encoders import load_encoder

torch = pytest.importorskip("torch")
nets = pytest.importorskip("monai.networks.nets")

SIZES = {"hidden_size": 12, "mlp_dim": 20, "num_heads": 2}
WINDOW = (32, 16, 48)
MONAI = UNETRConfig.monai(WINDOW, 1, 2, feature_size=2, qkv_bias=True, **SIZES)
REFERENCE = UNETRConfig.reference(
    WINDOW, 1, 2, 32, num_layers=12, skip_layers=MONAI.skip_layers, **SIZES
)
VIT = {**SIZES, "in_channels": 1, "img_size": WINDOW, "patch_size": (16, 16, 16)}


class SelfMedMAE(torch.nn.Module):
    """The encoder of github.com/cvlab-stonybrook/SelfMedMAE without its class token.

    Zhou et al. 2022; blocks as timm has them. Its epsilon is 1e-6.
    """

    def __init__(self, epsilon):
        super().__init__()
        norm = functools.partial(torch.nn.LayerNorm, 12, eps=epsilon)
        self.encoder_pos_embed = torch.nn.Parameter(torch.randn(1, 6, 12))
        self.mask_token = torch.nn.Parameter(torch.randn(1, 1, 8))
        self.encoder_to_decoder = torch.nn.Linear(12, 8)
        encoder = torch.nn.Module()
        encoder.cls_token = torch.nn.Parameter(torch.randn(1, 1, 12))
        encoder.patch_embed = torch.nn.Module()
        encoder.patch_embed.proj = torch.nn.Conv3d(1, 12, 16, stride=16)
        encoder.blocks = torch.nn.ModuleList(self._block(norm) for _ in range(12))
        encoder.norm = norm()
        self.encoder = encoder

    @staticmethod
    def _block(norm):
        block = torch.nn.Module()
        block.norm1, block.norm2 = norm(), norm()
        block.attn = torch.nn.Module()
        block.attn.qkv, block.attn.proj = torch.nn.Linear(12, 36), torch.nn.Linear(12, 12)
        block.mlp = torch.nn.Module()
        block.mlp.fc1, block.mlp.fc2 = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12)
        return block

    def forward(self, x):
        x = self.encoder.patch_embed.proj(x).flatten(2).transpose(1, 2) + self.encoder_pos_embed
        hidden = []
        for block in self.encoder.blocks:
            qkv = block.attn.qkv(block.norm1(x)).reshape(len(x), -1, 3, 2, 6)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
            y = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)))
            x = x + block.mlp.fc2(y)
            hidden.append(x)
        return self.encoder.norm(x), hidden


def randomized(model):
    """Gives every array random values, running norms and zero tokens too, in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for array in model.parameters():
            array.copy_(0.3 * torch.randn(array.shape, generator=generator) + (array.ndim == 1))
    return model.double().eval()


@functools.cache
def source(name):
    """A source's encoder, its state dict, and its blocks' outputs, the last one normed, too."""
    x = torch.from_numpy(image()).movedim(-1, 1)
    if name == "selfmedmae":
        model = randomized(SelfMedMAE(1e-5))
        state_dict = model.state_dict()
        with torch.no_grad():
            last, hidden = model(x)
    elif name == "vitautoenc":
        # As MONAI's tutorial of self-supervised pre-training makes it.
        model = randomized(nets.ViTAutoEnc(**VIT, proj_type="conv"))
        state_dict = model.state_dict()
        with torch.no_grad():
            _, hidden = model(x)
            last = model.norm(hidden[-1])
    else:
        if name == "mae":
            learned = {"pos_embed_type": "learnable", "decoder_pos_embed_type": "learnable"}
            model = randomized(nets.MaskedAutoEncoderViT(**VIT, **learned))
        else:
            model = randomized(nets.ViT(**VIT, qkv_bias=True, proj_type="perceptron"))
        state_dict = model.state_dict()
        hidden = []
        with torch.no_grad():
            y = model.patch_embedding(x)
            for block in model.blocks[:12]:
                y = block(y)
                hidden.append(y)
            last = (model.norm if name == "vit" else model.blocks[12])(y)
    return state_dict, [each.numpy() for each in hidden], last.numpy()


def image():
    return np.random.default_rng(0).standard_normal((2, *WINDOW, 1))


@functools.cache
def variables(cfg):
    shapes = abstract_variables(UNETR(cfg))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 7.0), shapes)


@functools.cache
def features_of(cfg):
    encoder = VisionTransformer(cfg, param_dtype=np.float64)
    return jax.jit(lambda params, x: encoder.apply({"params": params}, x)[0])


@pytest.mark.parametrize("cfg", [MONAI, REFERENCE], ids=["monai", "reference"])
@pytest.mark.parametrize("name", ["vit", "vitautoenc", "mae", "selfmedmae"])
def test_features_are_those_of_the_source(name, cfg):
    state_dict, hidden, last = source(name)
    with jax.enable_x64(True):
        loaded, transfer = load_encoder(state_dict, cfg, variables(cfg))
        ours = jax.device_get(features_of(cfg)(loaded["params"]["encoder"], image()))
    theirs = [hidden[layer - 1] for layer in cfg.skip_layers]
    if cfg is MONAI:
        theirs[-1] = last
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() <= 1e-10 * np.abs(b).max()
    assert transfer.loaded + len(transfer.skipped) == len(state_dict)
    assert not transfer.resized
    assert (np.unique(loaded["params"]["decoder"]["head"]["kernel"]) == 7).all()


def test_what_became_of_the_keys_is_told():
    _, transfer = load_encoder(source("selfmedmae")[0], MONAI, variables(MONAI))
    assert transfer.describe().splitlines() == [
        "encoder from SelfMedMAE's encoder",
        "  149 keys loaded, 4 skipped (encoder.cls_token, encoder_to_decoder, mask_token), "
        "0 resized",
        "  class token left out",
        "  norms add 1e-05 to variances, in the source 1e-06",
    ]


@pytest.mark.parametrize("prefix", ["vit.", "module.", "model.student.vit."])
@pytest.mark.parametrize("name", ["vit", "vitautoenc"])
def test_prefixes_are_found(name, prefix):
    state_dict = {prefix + key: value for key, value in source(name)[0].items()}
    state_dict["head.weight"] = np.zeros(3)
    loaded, transfer = load_encoder(state_dict, MONAI, variables(MONAI))
    expected, _ = load_encoder(source(name)[0], MONAI, variables(MONAI))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert transfer.prefix == prefix
    assert "head.weight" in transfer.skipped


def test_what_an_autoencoder_has_beside_its_encoder_is_skipped():
    # MONAI 1.4 and 1.5 wrote this for each block.
    cross = {f"blocks.{i}.cross_attn.to_q.weight": torch.ones(12, 12) for i in range(12)}
    _, transfer = load_encoder(source("vitautoenc")[0] | cross, MONAI, variables(MONAI))
    assert transfer.describe().splitlines() == [
        "encoder from MONAI's ViT, ViTAutoEnc or MaskedAutoEncoderViT",
        "  137 keys loaded, 40 skipped (blocks.*.cross_attn.to_q, blocks.*.norm_cross_attn, "
        "conv3d_transpose, conv3d_transpose_1), 0 resized",
    ]


def test_encoders_of_whole_models_are_taken_too():
    expected = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).standard_normal(leaf.shape),
        variables(MONAI),
    )
    loaded, transfer = load_encoder(to_torch(expected, MONAI), MONAI, variables(MONAI))
    for a, b in zip(
        jax.tree.leaves(loaded["params"]["encoder"]),
        jax.tree.leaves(expected["params"]["encoder"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert (transfer.prefix, transfer.loaded) == ("vit.", 149)


def test_another_number_of_channels_and_another_window():
    state_dict, _, _ = source("selfmedmae")
    cfg = UNETRConfig.monai((48, 16, 48), 2, 2, feature_size=2, qkv_bias=True, **SIZES)
    loaded, transfer = load_encoder(state_dict, cfg, variables(cfg), img_size=WINDOW)
    embedding = loaded["params"]["encoder"]["embedding"]
    kernel = state_dict["encoder.patch_embed.proj.weight"].numpy()
    for channel in range(2):  # equal channels give what one gave
        ours = embedding["projection"]["kernel"][..., channel, :].transpose(3, 0, 1, 2)
        np.testing.assert_array_equal(2 * ours, kernel[:, 0])
    given = state_dict["encoder_pos_embed"].reshape(1, 2, 1, 3, 12).movedim(-1, 1)
    theirs = torch.nn.functional.interpolate(given, (3, 1, 3), mode="trilinear")
    np.testing.assert_allclose(
        embedding["position_embedding"], theirs.flatten(2).transpose(1, 2), atol=1e-12
    )
    assert transfer.resized == (
        "positions interpolated from 2 x 1 x 3 to 3 x 1 x 3 patches",
        "stem of 1 channels shared equally among 2",
    )


def test_the_row_of_a_class_token_is_taken_off_the_positions():
    state_dict = dict(source("selfmedmae")[0])
    expected, _ = load_encoder(state_dict, MONAI, variables(MONAI))
    positions = state_dict.pop("encoder_pos_embed")
    # The name that fine-tuning gives them.
    state_dict["encoder.pos_embed"] = torch.cat([torch.zeros(1, 1, 12), positions], 1)
    loaded, transfer = load_encoder(state_dict, MONAI, variables(MONAI))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert transfer.resized == ("row of the class token taken off the positions",)


def test_patches_are_never_taken_for_a_class_token_and_a_cube():
    # Nine patches, 3 x 1 x 3, are no class token and 2 x 2 x 2.
    state_dict = dict(source("vit")[0])
    positions = np.ones((1, 9, 12))
    state_dict["patch_embedding.position_embeddings"] = positions
    with pytest.raises(CheckpointError, match="img_size: must be the encoder's window"):
        load_encoder(state_dict, MONAI, variables(MONAI))
    _, transfer = load_encoder(state_dict, MONAI, variables(MONAI), img_size=(48, 16, 48))
    assert transfer.resized == ("positions interpolated from 3 x 1 x 3 to 2 x 1 x 3 patches",)


def test_patches_of_equal_axes_are_not_taken_for_others_of_that_number():
    state_dict = dict(source("selfmedmae")[0])
    state_dict["encoder_pos_embed"] = torch.randn(1, 8, 12)
    cfg = UNETRConfig.monai((64, 32, 16), 1, 2, feature_size=2, qkv_bias=True, **SIZES)
    with pytest.raises(CheckpointError, match=r"img_size: must be given.* 2 x 2 x 2 or 4 x 2 x 1"):
        load_encoder(state_dict, cfg, variables(cfg))
    _, transfer = load_encoder(state_dict, cfg, variables(cfg), img_size=(32, 32, 32))
    assert transfer.resized == ("positions interpolated from 2 x 2 x 2 to 4 x 2 x 1 patches",)
    _, transfer = load_encoder(state_dict, cfg, variables(cfg), img_size=cfg.img_size)
    assert transfer.resized == ()


@pytest.mark.parametrize("img_size", [(16,), (-32, -16, 48), (33, 17, 49), (0, 16, 48)])
def test_windows_that_are_not_made_of_patches_are_refused(img_size):
    with pytest.raises(CheckpointError, match="img_size: must be 3 positive multiples of the pat"):
        load_encoder(source("vit")[0], MONAI, variables(MONAI), img_size=img_size)


def replaced(key, value):
    return {**source("vit")[0], key: value}


def changed(cfg=MONAI, **values):
    return UNETRConfig(**{**cfg.to_dict(), **values})


def extra(key, name="selfmedmae"):
    return {**source(name)[0], key: torch.ones(12)}


@pytest.mark.parametrize(
    ("state_dict", "cfg", "message"),
    [
        (lambda: extra("encoder.blocks.3.ls1.gamma"), MONAI, "has layer scale"),
        (lambda: extra("encoder.rope.freqs"), MONAI, "has rotary positions"),
        (lambda: extra("encoder.blocks.0.attn.q_norm.weight"), MONAI, "norms of queries"),
        (lambda: extra("encoder.blocks.0.new.weight"), MONAI, "blocks nothing like it"),
        (lambda: extra("encoder.patch_embed.norm.weight"), MONAI, "embedding nothing like it"),
        (lambda: extra("blocks.12.attn.x", "vit"), MONAI, "blocks nothing like it"),
        (lambda: source("vit")[0], changed(hidden_size=24), "width of tokens 12, in the model 24"),
        (lambda: source("mae")[0], changed(mlp_dim=24), "feed-forward layer 20, in the model 24"),
        (lambda: source("vit")[0], changed(qkv_bias=False), "biases, in the model they have none"),
        (
            lambda: replaced("patch_embedding.position_embeddings", torch.ones(6)),
            MONAI,
            "positions have shape (6,), must have 3 axes",
        ),
        (
            lambda: replaced("blocks.3.mlp.linear1.bias", torch.tensor(20 * [float("nan")])),
            MONAI,
            "blocks.3.mlp.linear1.bias: 20 of 20 numbers are NaN or infinite",
        ),
        (lambda: {"layers.0.weight": np.ones(2)}, MONAI, "no pretrained encoder that is known"),
        (lambda: source("mae")[0], changed(REFERENCE, patch_size=(8, 8, 8)), "patch (16, 16, 16)"),
        (
            lambda: source("mae")[0],
            changed(REFERENCE, num_layers=4, skip_layers=(1, 2, 3, 4)),
            "blocks 12, in the model 4",
        ),
        (lambda: source("mae")[0], changed(img_size=(32, 32, 32)), "img_size: must be"),
        (
            lambda: {key: v for key, v in source("mae")[0].items() if key != "blocks.3.norm2.bias"},
            MONAI,
            "blocks.3.norm2.bias is missing",
        ),
        (
            lambda: {f"{s}.{key}": v for s in "ab" for key, v in source("mae")[0].items()},
            MONAI,
            "encoders behind 'a.' and 'b.'",
        ),
    ],
)
def test_encoders_that_do_not_fit_are_refused_in_one_line(state_dict, cfg, message):
    with pytest.raises(CheckpointError) as error:
        load_encoder(state_dict(), cfg, variables(cfg))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
