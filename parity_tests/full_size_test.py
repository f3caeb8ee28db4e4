"""Compares the models at the article's sizes: the whole at 128^3, the transformer at 224^3."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from parity_tests.gradients import gradient_rows
from unetr_flax import UNETRConfig
from unetr_flax.model.encoder import VisionTransformer
from unetr_flax.parity.rows import assert_rows, compare_arrays
from unetr_flax.parity.twins import (
    channels_first,
    channels_first_tensor,
    make_twins,
    precise,
    randomize,
)
from unetr_flax.weights.mapping import array_pairs, module_pairs, table_of
from unetr_torch_ref import Embeddings, TransformerBlock


@pytest.mark.slow
def test_the_article_s_model_at_128():
    cfg = UNETRConfig.reference((128, 128, 128), in_channels=1, out_channels=4, light_r=4)
    with precise():
        twins = make_twins(cfg, "float32", batch=1)
        assert sum(p.numel() for p in twins.torch_model.parameters()) == 92_459_028
        apply = jax.jit(lambda variables, x: twins.model.apply(variables, x, return_skips=True))
        logits, skips = apply(twins.variables, twins.image)
    x = channels_first_tensor(twins.image)
    with torch.no_grad():
        features, theirs = twins.torch_model.encode(x), twins.torch_model(x)
    rows = [compare_arrays("logits", "logits", channels_first(logits), theirs.numpy())]
    rows += [
        compare_arrays("skip features", f"z{layer}", skip, feature.numpy())
        for layer, skip, feature in zip(cfg.skip_layers, skips, features, strict=True)
    ]
    assert_rows(rows)


@pytest.mark.slow
def test_a_training_step_s_gradients_at_128_in_float64():
    cfg = UNETRConfig.reference((128, 128, 128), in_channels=1, out_channels=4, light_r=4)
    with precise():
        twins = make_twins(cfg, "float64", batch=1)
        twins = dataclasses.replace(twins, model=twins.model.clone(remat=True))
        assert_rows(gradient_rows(twins, train=True))


@pytest.mark.slow
def test_the_article_s_transformer_at_224():
    cfg = UNETRConfig.reference((224, 224, 224), in_channels=1, out_channels=4)
    encoder = torch.nn.ModuleDict(
        {"embedding": Embeddings((1, *cfg.img_size)), "transformer": TransformerBlock()}
    ).eval()
    randomize(encoder, seed=0)
    state = encoder.state_dict()
    params: dict = {}
    for pair in array_pairs(module_pairs(cfg), table_of(cfg)):
        if pair.torch_keys[0] in state:
            *path, leaf = pair.flax_path[2:]  # below "params", "encoder"
            node = params
            for name in path:
                node = node.setdefault(name, {})
            array = state[pair.torch_keys[0]].numpy()
            node[leaf] = pair.layout.to_flax(array, h=cfg.num_heads, qkv=3)
    image = np.random.default_rng(0).standard_normal((1, *cfg.img_size, 1), np.float32)
    with torch.no_grad():
        features = encoder["transformer"](encoder["embedding"](channels_first_tensor(image)))
    with precise():
        skips, _ = jax.jit(VisionTransformer(cfg).apply)({"params": params}, image)
    assert [tuple(feature.shape) for feature in features] == [(1, 2744, 768)] * 4
    assert_rows(
        [
            compare_arrays("skip features", f"z{layer}", skip, feature.numpy())
            for layer, skip, feature in zip(cfg.skip_layers, skips, features, strict=True)
        ]
    )
