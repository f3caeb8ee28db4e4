"""A family that nobody has, registered from this one file: every command must work for it."""

import fractions
import math
from unittest import mock

import numpy as np
import pytest

from unetr_flax import UNETRConfig, cli
from unetr_flax.model.family_spec import (
    CONV_BLOCKS_ONLY,
    FAMILY_SPECS,
    FamilySpec,
    register_spec,
)
from unetr_flax.weights import (
    CheckpointError,
    from_torch,
    infer_config,
    load_pretrained,
    read_state_dict,
    to_torch,
)
from unetr_flax.weights.families import FAMILIES, Family, TorchModel, conv_decoder, register
from unetr_flax.weights.families.shapes import image_size
from unetr_flax.weights.layouts import Layout
from unetr_flax.weights.tables import LAYER_NORM, LINEAR, PROJECTION, Table, bias, weight
from unetr_flax.weights.unused_keys import known_unused, unused_keys

torch = pytest.importorskip("torch")
unetr_torch_ref = pytest.importorskip("unetr_torch_ref")

# The model: blocks like MONAI's with ReLU and an epsilon of their own, the article's decoder.

EPSILON = 1e-3

SPEC = FamilySpec(
    scale_by_head=True,
    layer_norm_epsilon=EPSILON,
    activation="relu",
    final_norm=True,
    output_dropout=(),
    position_std=0.0,
    blocks=("conv",),
    tapering_skips=False,
    early_narrowing=True,
    fixed=CONV_BLOCKS_ONLY,
)


class Patches(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        size = cfg.patch_size
        self.map = torch.nn.Conv3d(cfg.in_channels, cfg.hidden_size, size, size)
        self.where = torch.nn.Parameter(torch.zeros(cfg.num_patches, cfg.hidden_size))

    def forward(self, x):
        return self.map(x).flatten(2).transpose(1, 2) + self.where


class Attention(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.num_heads
        self.into = torch.nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.weights = torch.nn.Identity()
        self.out = torch.nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.into(x).reshape(batch, tokens, self.heads, 3, -1)
        query, key, value = qkv.permute(3, 0, 2, 1, 4)
        energy = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        mixed = self.weights(energy.softmax(-1)) @ value
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Step(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width = cfg.hidden_size
        self.norm_a = torch.nn.LayerNorm(width, EPSILON)
        self.attend = Attention(cfg)
        self.norm_b = torch.nn.LayerNorm(width, EPSILON)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, cfg.mlp_dim),
            torch.nn.ReLU(),
            torch.nn.Linear(cfg.mlp_dim, width),
        )

    def forward(self, x):
        x = x + self.attend(self.norm_a(x))
        return x + self.mlp(self.norm_b(x))


class Backbone(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.skip_layers = cfg.skip_layers
        self.patches = Patches(cfg)
        self.steps = torch.nn.ModuleList(Step(cfg) for _ in range(cfg.num_layers))
        self.end = torch.nn.LayerNorm(cfg.hidden_size, EPSILON)

    def forward(self, x):
        x = self.patches(x)
        features = {}
        for number, step in enumerate(self.steps, start=1):
            features[number] = x = step(x)
        last = self.end(x)
        return last, [*(features[number] for number in self.skip_layers[:-1]), last]


class InventedUNETR(unetr_torch_ref.UNETR):
    def __init__(self, cfg):
        light_r = fractions.Fraction(64, cfg.channels[0])
        super().__init__(**conv_decoder.torch_arguments(cfg), light_r=light_r)
        del self.embedding, self.transformer
        self.backbone = Backbone(cfg)

    def encode(self, x, mask=None):
        return self.backbone(x)[1]


# Its files.

TABLE = Table(
    rows=(
        ("backbone.patches", "encoder/embedding", "embedding"),
        ("backbone.steps.{layer}.norm_a", "encoder/block_{layer}/norm1", "norm"),
        ("backbone.steps.{layer}.attend", "encoder/block_{layer}/attention", "attention"),
        ("backbone.steps.{layer}.norm_b", "encoder/block_{layer}/norm2", "norm"),
        ("backbone.steps.{layer}.mlp", "encoder/block_{layer}/feed_forward", "feed_forward"),
        ("backbone.end", "encoder/norm", "norm"),
        *conv_decoder.DECODER_ROWS,
    ),
    parts={
        "embedding": (("map", "projection", "conv"),),
        "attention": (("into", "qkv", "qkv"), ("out", "projection", "projection")),
        "feed_forward": (("0", "expand", "linear"), ("2", "contract", "linear")),
        **conv_decoder.DECODER_PARTS,
    },
    arrays={
        "embedding": (("where", "params", "position_embedding", Layout("n e", "1 n e")),),
        "qkv": (
            weight("kernel", Layout("(h qkv d) e", "e qkv h d")),
            bias(Layout("(h qkv d)", "qkv h d")),
        ),
        "projection": PROJECTION,
        "linear": LINEAR,
        "norm": LAYER_NORM,
        **conv_decoder.DECODER_ARRAYS,
    },
)


def config(shapes, *, num_heads, img_size, dropout_rate):
    hidden_size, in_channels, *patch_size = shapes.axes("backbone.patches.map.weight", 5)
    tokens, _ = shapes.axes("backbone.patches.where", 2)
    layers = shapes.count(r"backbone\.steps\.(\d+)\.norm_a\.weight")
    width = conv_decoder.decoder_width(shapes)
    return UNETRConfig(
        family="invented",
        img_size=image_size(img_size, patch_size, tokens),
        in_channels=in_channels,
        out_channels=conv_decoder.out_channels(shapes),
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=num_heads,
        mlp_dim=shapes["backbone.steps.0.mlp.0.weight"][0],
        skip_layers=tuple(range(layers - 3, layers + 1)),
        channels=tuple(width * 2**i for i in range(4)),
        norm_groups=None,
        block="conv",
        dropout_rate=dropout_rate,
        **dict(CONV_BLOCKS_ONLY),
    )


def first_version_s_keys(cfg, version):
    if version == "1":
        return {"backbone.class": np.zeros((1, cfg.hidden_size), np.float32)}
    return {}


INVENTED = Family(
    name="invented",
    signature="backbone.steps.",
    table=lambda cfg: TABLE,
    config=config,
    default_num_heads=6,
    options=(),
    torch_model=TorchModel(
        make=InventedUNETR,
        package=__name__,
        install="invented",
        encoder="backbone",
        stages=conv_decoder.STAGES,
        qkv="(h qkv d)",
        attention_dropout="weights",
        features=lambda output, cfg: output[1],
    ),
    unused_keys=first_version_s_keys,
    versions=("1", "2"),
)

# The tests. A window, heads and an odd number of blocks that no default could stand for.

TOLD = {"num_heads": 2, "img_size": (16, 8, 4)}
OPTIONS = ("--num-heads", "2", "--img-size", "16", "8", "4")


@pytest.fixture(autouse=True)
def strict_promotion():
    """Allows promotion in these tests: Flax's own LayerNorm promotes float64 and float32."""


@pytest.fixture(autouse=True)
def registered():
    with mock.patch.dict(FAMILY_SPECS), mock.patch.dict(FAMILIES):
        register_spec("invented", SPEC)
        register(INVENTED)
        yield
    assert "invented" not in FAMILIES


@pytest.fixture
def cfg():
    return UNETRConfig(
        family="invented",
        img_size=(16, 8, 4),
        in_channels=2,
        out_channels=3,
        patch_size=(4, 4, 2),
        hidden_size=8,
        num_layers=5,
        num_heads=2,
        mlp_dim=12,
        skip_layers=(2, 3, 4, 5),
        channels=(4, 8, 16, 32),
        norm_groups=None,
        block="conv",
        dropout_rate=0.0,
        **dict(CONV_BLOCKS_ONLY),
    )


@pytest.fixture
def model(cfg):
    from unetr_flax.parity.torch_models import torch_model_of
    from unetr_flax.parity.twins import randomize

    model = torch_model_of(cfg)
    randomize(model, seed=0)
    return model


@pytest.fixture
def file(model, tmp_path):
    """Writes a checkpoint of the first version behind unknown prefixes."""
    state_dict = {**model.state_dict(), "backbone.class": torch.ones(1, 8)}
    path = tmp_path / "best.pt"
    torch.save({"net": {f"my.own.{k}": v for k, v in state_dict.items()}, "epoch": 3}, path)
    return path


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["unetr", *map(str, args)])
    return cli.main()


def weights_of(model):
    return {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def test_round_trip(cfg, model):
    state_dict = model.state_dict()
    assert infer_config(state_dict, **TOLD) == cfg
    back = to_torch(from_torch(state_dict, cfg), cfg)
    expected = weights_of(model)
    assert back.keys() == expected.keys()
    assert all(np.array_equal(back[key], expected[key].numpy()) for key in back)


def test_what_shapes_do_not_tell(model):
    with pytest.raises(CheckpointError, match="default of family 'invented' is 6"):
        infer_config(model.state_dict())
    with pytest.raises(CheckpointError, match="img_size: 16 position embeddings"):
        infer_config(model.state_dict(), num_heads=2)
    for option in ({"norm_name": "batch"}, {"skip_layers": (1, 2, 3, 4)}):
        with pytest.raises(CheckpointError, match="cannot be given for family 'invented'"):
            infer_config(model.state_dict(), **TOLD, **option)


def test_unused_keys(cfg):
    assert list(unused_keys(cfg, "1")) == ["backbone.class"]
    assert unused_keys(cfg, "2") == unused_keys(cfg) == {}
    assert known_unused(cfg) == {"backbone.class"}


def test_convert_and_back(monkeypatch, capsys, tmp_path, cfg, model, file):
    folder, back = tmp_path / "model", tmp_path / "back.safetensors"
    assert run(monkeypatch, "convert", file, folder, *OPTIONS) == 0
    shown = capsys.readouterr().out
    assert "family 'invented'" in shown
    assert "net of a checkpoint, prefix 'my.own.' removed, 17 counters dropped\n" in shown
    assert "1 key that the model never applies dropped, such as backbone.class" in shown
    assert load_pretrained(folder)[0] == cfg
    assert run(monkeypatch, "convert", folder, back, "--to", "torch") == 0
    found, expected = read_state_dict(back).state_dict, weights_of(model)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key].numpy()) for key in found)


def test_verify(monkeypatch, capsys, file):
    assert run(monkeypatch, "verify", file, *OPTIONS) == 0
    shown = capsys.readouterr().out
    for block in ("backbone.patches", "backbone.steps.4", "backbone.end", "decoder0_header"):
        assert block in shown
    assert "NO" not in shown


def test_summary(monkeypatch, capsys, file):
    assert run(monkeypatch, "summary", file, *OPTIONS, "--depth", "1") == 0
    assert "float32[1,16,8,4,2]" in capsys.readouterr().out


def test_names_and_signatures_are_taken_once():
    with pytest.raises(ValueError, match="family 'invented': is registered already"):
        register_spec("invented", SPEC)
    with pytest.raises(ValueError, match=r"family 'invented', .* is registered already"):
        register(INVENTED)
    del FAMILIES["invented"], FAMILY_SPECS["invented"]
    with pytest.raises(ValueError, match="family 'invented': register its FamilySpec first"):
        register(INVENTED)
    with pytest.raises(ValueError, match="family='invented': must be 'reference' or"):
        UNETRConfig.from_dict(
            {**UNETRConfig.reference((16,), 1, 2).to_dict(), "family": "invented"}
        )
