import math

import pytest
import torch

from unetr_torch_ref import (
    Embeddings,
    FeedForwardBlock,
    MultiHeadAttention,
    PreNorm,
    TransformerBlock,
)

B, N, E, H = 2, 5, 12, 3


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, E, generator=generator, dtype=torch.float64)


def attention_weights(module, x, mask=None):
    """Runs the module; returns the input of its dropout of attention weights, and its output."""
    seen = []
    handle = module.att_drop.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    out = module(x, mask)
    handle.remove()
    return seen[0], out


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_counts_of_the_article():
    with torch.device("meta"):
        embeddings = Embeddings((1, 224, 224, 224))
        attention, feed_forward = MultiHeadAttention(), FeedForwardBlock()
        transformer = TransformerBlock()
        features = transformer(embeddings(torch.empty(1, 1, 224, 224, 224)))
    assert count(embeddings.patch_embeddings) == 3_146_496
    assert embeddings.n_patches == 2_744
    assert [tuple(z.shape) for z in features] == [(1, 2744, 768)] * 4
    assert count(attention.qkv) == 1_771_776
    assert count(attention.projection) == 590_592
    assert count(feed_forward[0]) == 2_362_368
    assert count(feed_forward[3]) == 2_360_064
    assert count(transformer) == 85_054_464


def test_embeddings_are_patches_in_row_major_order_plus_positions():
    module = Embeddings((2, 8, 4, 6), patch_size=(4, 2, 2), embed_dim=E).double()
    assert not module.position_embeddings.any()
    torch.nn.init.normal_(module.position_embeddings)
    x = torch.randn(B, 2, 8, 4, 6, dtype=torch.float64)
    kernel = module.patch_embeddings.weight.flatten(1)
    out = module(x)
    assert out.shape == (B, 2 * 2 * 3, E)
    n = 0
    for i in range(2):
        for j in range(2):
            for k in range(3):
                patch = x[:, :, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2]
                token = patch.flatten(1) @ kernel.T + module.patch_embeddings.bias
                torch.testing.assert_close(out[:, n], token + module.position_embeddings[0, n])
                n += 1


def test_attention_is_that_of_the_article():
    module = MultiHeadAttention(E, H).double()
    x = tokens()
    qkv = module.qkv(x)
    d = E // H
    heads = []
    for h in range(H):
        # Output feature (h*d + i)*3 + which: which of query, key and value varies fastest.
        query, key, value = (qkv[..., h * d * 3 + w : (h + 1) * d * 3 : 3] for w in range(3))
        weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(E), dim=-1)
        heads.append(weights @ value)
    torch.testing.assert_close(module(x), module.projection(torch.cat(heads, dim=-1)))


def test_feed_forward_is_linear_exact_gelu_linear():
    module = FeedForwardBlock(E, expansion=2).double()
    assert set(module.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert module[0].out_features == 2 * E
    hidden = module[0](tokens())
    gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(module(tokens()), module[3](gelu))
    assert FeedForwardBlock(E, hidden=7)[0].out_features == 7


def test_masked_key_has_no_influence():
    module = MultiHeadAttention(E, H).double()
    x, changed = tokens(), tokens()
    changed[:, 2] += 10
    others = [0, 1, 3, 4]
    mask = torch.ones(1, 1, 1, N, dtype=torch.bool)
    assert not torch.allclose(module(x)[:, others], module(changed)[:, others])
    torch.testing.assert_close(module(x, mask), module(x))
    mask[..., 2] = False
    assert torch.equal(module(x, mask)[:, others], module(changed, mask)[:, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_is_per_batch_head_query_and_key(dtype):
    module = MultiHeadAttention(E, H).to(dtype)
    mask = torch.rand(B, H, N, N, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    weights, _ = attention_weights(module, tokens().to(dtype), mask)
    assert not weights[~mask].any()
    assert (weights[mask] > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fully_masked_query_attends_uniformly(dtype):
    module = MultiHeadAttention(E, H).to(dtype)
    mask = torch.ones(B, 1, N, N, dtype=torch.bool)
    mask[1, :, 3] = False
    x = tokens().to(dtype)
    weights, out = attention_weights(module, x, mask)
    torch.testing.assert_close(weights[1, :, 3], torch.full((H, N), 1 / N, dtype=dtype))
    unmasked, _ = attention_weights(module, x)
    torch.testing.assert_close(weights[0], unmasked[0])
    assert torch.isfinite(out).all()


def test_mask_reaches_every_block():
    module = TransformerBlock(E, H, depth=4, extract_layers=(1, 2, 3, 4)).double()
    x, changed = tokens(), tokens()
    changed[:, 2] += 10
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[:, 2] = False
    others = [0, 1, 3, 4]
    for z, z_changed in zip(module(x, mask), module(changed, mask), strict=True):
        assert torch.equal(z[:, others], z_changed[:, others])


def test_transformer_is_pre_norm_with_residuals_and_no_final_norm():
    module = TransformerBlock(E, H, depth=3, extract_layers=(1, 3), mlp_dim=7).double()
    assert module.layers[0][1].fn[0].out_features == 7
    x, expected = tokens(), []
    for attn, ff in module.layers:
        assert isinstance(attn, PreNorm)
        x = x + attn.fn(attn.norm(x))
        x = x + ff.fn(ff.norm(x))
        expected.append(x)
    for z, z_expected in zip(module(tokens()), expected[::2], strict=True):
        torch.testing.assert_close(z, z_expected)


def test_errors_name_field_value_and_what_is_allowed():
    with pytest.raises(ValueError, match=r"num_heads=5: must divide the embedding size 12"):
        MultiHeadAttention(E, 5)
    with pytest.raises(ValueError, match=r"mask: dtype torch.float32, must be torch.bool"):
        MultiHeadAttention(E, H).double()(tokens(), torch.ones(N, N))
    with pytest.raises(ValueError, match=r"img_shape=\(8, 6\): must be three sizes"):
        Embeddings((1, 8, 6), 2)
    with pytest.raises(ValueError, match=r"patch_size=\(2, 2\): must be one positive number or"):
        Embeddings((1, 8, 6, 4), (2, 2))
