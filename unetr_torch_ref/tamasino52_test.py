import math
import re

import pytest
import torch

from unetr_torch_ref import Tamasino52UNETR

SMALL = {
    "img_shape": (32, 16, 48),
    "input_dim": 2,
    "output_dim": 3,
    "embed_dim": 12,
    "num_heads": 3,
    "mlp_dim": 7,
    "channels": 4,
}

LAYER_KEYS = [
    f"{module}.{leaf}"
    for module in (
        "attention_norm",
        "attn.query",
        "attn.key",
        "attn.value",
        "attn.out",
        "mlp_norm",
        "mlp.w_1",
        "mlp.w_2",
    )
    for leaf in ("weight", "bias")
]

# The blocks of each part of the decoder: "u" up-samples alone, "d" up-samples and convolves, "c"
# convolves with batch norm, "o" convolves alone. Then the default widths, where "C" stands for the
# channels of the image and "K" for those of the logits.
DECODER = {
    "decoder0": ("cc", ["C", 32, 64]),
    "decoder3": ("ddd", [768, 512, 256, 128]),
    "decoder6": ("dd", [768, 512, 256]),
    "decoder9": ("d", [768, 512]),
    "decoder12_upsampler": ("u", [768, 512]),
    "decoder9_upsampler": ("cccu", [1024, 512, 512, 512, 256]),
    "decoder6_upsampler": ("ccu", [512, 256, 256, 128]),
    "decoder3_upsampler": ("ccu", [256, 128, 128, 64]),
    "decoder0_header": ("cco", [128, 64, 64, "K"]),
}


def decoder_keys():
    keys = []
    for part, (blocks, _) in DECODER.items():
        for i, block in enumerate(blocks):
            name = part if len(blocks) == 1 else f"{part}.{i}"
            singles = {"u": ["block"], "o": ["block"], "c": ["block.0.block"]}
            singles["d"] = ["block.0.block", "block.1.block"]
            keys += [f"{name}.{s}.{leaf}" for s in singles[block] for leaf in ("weight", "bias")]
            if block in "cd":
                norm = f"{name}.block.{1 if block == 'c' else 2}"
                leaves = "weight bias running_mean running_var num_batches_tracked"
                keys += [f"{norm}.{leaf}" for leaf in leaves.split()]
    return keys


def count(in_channels, out_channels):
    """Counts the parameters of the default model from its sizes: 12 layers of 768, MLPs of 2048."""
    e, mlp, patches = 768, 2048, 8**3
    total = 16**3 * in_channels * e + e + patches * e + 2 * e
    total += 12 * (2 * 2 * e + 4 * (e * e + e) + e * mlp + mlp + mlp * e + e)
    for blocks, widths in DECODER.values():
        widths = [{"C": in_channels, "K": out_channels}.get(width, width) for width in widths]
        for block, a, b in zip(blocks, widths[:-1], widths[1:], strict=True):
            total += {
                "u": 8 * a * b + b,
                "d": 8 * a * b + b + 27 * b * b + b + 2 * b,
                "c": 27 * a * b + b + 2 * b,
                "o": a * b + b,
            }[block]
    return total


def small(**changes):
    torch.manual_seed(0)
    model = Tamasino52UNETR(**{**SMALL, **changes}).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def image():
    return torch.randn(2, 2, 32, 16, 48, dtype=torch.float64)


def test_keys_are_those_of_its_checkpoints():
    transformer = [
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.weight",
        "embeddings.patch_embeddings.bias",
        "encoder_norm.weight",
        "encoder_norm.bias",
        *(f"layer.{i}.{key}" for i in range(12) for key in LAYER_KEYS),
    ]
    expected = [f"transformer.{key}" for key in transformer] + decoder_keys()
    assert sorted(small().state_dict()) == sorted(expected)


def test_number_of_parameters():
    with torch.device("meta"):
        model = Tamasino52UNETR()
        assert sum(p.numel() for p in model.parameters()) == count(4, 3)
        logits = model.eval()(torch.empty(1, 4, 128, 128, 128))
    assert logits.shape == (1, 3, 128, 128, 128)


def test_shapes():
    model, x = small(), image()
    assert model(x).shape == (2, 3, 32, 16, 48)
    assert [z.shape for z in model.encode(x)] == [(2, 2 * 1 * 3, 12)] * 4
    thin = small(img_shape=(8, 16, 4), patch_size=(4, 8, 1))
    assert thin(torch.randn(2, 2, 8, 16, 4, dtype=torch.float64)).shape == (2, 3, 8, 16, 4)


def test_features_are_those_after_blocks_3_6_9_and_12_without_a_norm():
    model, x = small(), image()
    tokens = model.transformer.embeddings(x)
    expected = []
    for number, layer in enumerate(model.transformer.layer, start=1):
        tokens = layer(tokens)
        if number % 3 == 0:
            expected.append(tokens)
    for feature, z in zip(model.encode(x), expected, strict=True):
        torch.testing.assert_close(feature, z)


def test_layer_is_pre_norm_attention_by_heads_and_relu():
    layer = small().transformer.layer[0]
    x = torch.randn(2, 5, 12, dtype=torch.float64)

    def norm(x, module):
        centered = x - x.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        return centered / (variance + 1e-6).sqrt() * module.weight + module.bias

    y = norm(x, layer.attention_norm)
    query, key, value = layer.attn.query(y), layer.attn.key(y), layer.attn.value(y)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        energy = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(4)
        heads.append(energy.softmax(-1) @ value[..., part])
    x1 = x + layer.attn.out(torch.cat(heads, dim=-1))
    hidden = layer.mlp.w_1(norm(x1, layer.mlp_norm)).clamp(min=0)
    torch.testing.assert_close(layer(x), x1 + layer.mlp.w_2(hidden))


def test_encoder_norm_has_no_effect():
    model, x = small(), image()
    before = model(x)
    torch.nn.init.constant_(model.transformer.encoder_norm.weight, 7)
    torch.nn.init.constant_(model.transformer.encoder_norm.bias, 7)
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == ["transformer.encoder_norm.weight", "transformer.encoder_norm.bias"]


def test_dropouts():
    model = small(dropout=0.25)
    found = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    layers = {re.sub(r"\d+", "0", name): p for name, p in found.items()}
    assert layers == {
        "transformer.embeddings.dropout": 0.25,
        "transformer.layer.0.attn.attn_dropout": 0.25,
        "transformer.layer.0.attn.proj_dropout": 0.25,
        "transformer.layer.0.mlp.dropout": 0.1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads=5: must divide embed_dim=12"),
        ({"channels": 3}, "channels=3: must be positive and even"),
        ({"num_layers": 8}, "ext_layers=(3, 6, 9, 12): must be 4 increasing numbers from 1 to"),
        ({"mlp_dim": 0}, "mlp_dim=0: must be a positive integer"),
        ({"img_shape": (32, 16)}, "img_shape=(32, 16): must be three sizes"),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**change)


def test_image_of_another_shape():
    with pytest.raises(ValueError, match=re.escape("x: shape (2, 1, 32, 16, 48), must be (batch")):
        small()(torch.zeros(2, 1, 32, 16, 48))
