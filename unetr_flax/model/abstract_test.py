import jax
import jax.numpy as jnp

from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model.abstract import abstract_image, abstract_variables


def test_image_is_the_models_input():
    cfg = UNETRConfig.reference((16, 8), 3, 2, patch_size=8)
    assert abstract_image(cfg) == jax.ShapeDtypeStruct((1, 16, 8, 3), jnp.float32)
    assert abstract_image(cfg, 5, jnp.bfloat16).shape == (5, 16, 8, 3)
    assert abstract_image(cfg, 5, jnp.bfloat16).dtype == jnp.bfloat16


def test_variables_of_the_article_s_model_without_its_memory():
    model = UNETR(UNETRConfig.reference((128, 128, 128), 1, 4))
    variables = abstract_variables(model)
    assert variables.keys() == {"params", "batch_stats"}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 92_459_028
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_batch_changes_nothing_and_instance_norms_have_no_statistics():
    cfg = UNETRConfig.monai((16, 16), 1, 2, feature_size=2, hidden_size=4, mlp_dim=4, num_heads=1)
    model = UNETR(cfg)
    assert abstract_variables(model, batch=3) == abstract_variables(model)
    assert abstract_variables(model).keys() == {"params"}
