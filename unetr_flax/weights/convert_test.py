import collections
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.weights import WeightsError, from_torch, to_torch
from unetr_flax.weights.mapping import array_pairs, module_pairs, table_of

CFG = UNETRConfig.reference(
    (32, 16, 48),
    2,
    3,
    8,
    patch_size=(16, 8, 16),
    hidden_size=24,
    num_layers=5,
    num_heads=3,
    mlp_dim=40,
)


@pytest.fixture(scope="module")
def variables():
    shapes = abstract_variables(UNETR(CFG))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


def assert_same(a, b):
    a, b = traverse_util.flatten_dict(a), traverse_util.flatten_dict(b)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key].view(np.uint8), b[key].view(np.uint8))


def test_round_trips_are_exact(variables):
    state_dict = to_torch(variables, CFG)
    assert_same(from_torch(state_dict, CFG), variables)
    again = to_torch(from_torch(state_dict, CFG), CFG)
    assert again.keys() == state_dict.keys()
    assert all(np.array_equal(again[key], state_dict[key]) for key in again)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_dtypes_are_kept(variables, dtype):
    state_dict = {k: v.astype(dtype) for k, v in to_torch(variables, CFG).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(from_torch(state_dict, CFG))} == {
        np.dtype(dtype)
    }


def test_tensors_are_copied_and_bfloat16_kept(variables):
    torch = pytest.importorskip("torch")
    state_dict = {k: torch.tensor(v).bfloat16() for k, v in to_torch(variables, CFG).items()}
    converted = from_torch(state_dict, CFG)
    before = jax.tree.map(np.copy, converted)
    for tensor in state_dict.values():
        tensor.zero_()
    assert_same(converted, before)
    assert {leaf.dtype for leaf in jax.tree.leaves(converted)} == {np.dtype(jnp.bfloat16)}


def test_mapping_names_every_leaf_once(variables):
    pairs = array_pairs(module_pairs(CFG), table_of(CFG))
    leaves = traverse_util.flatten_dict(variables)
    assert collections.Counter(pair.flax_path for pair in pairs) == dict.fromkeys(leaves, 1)
    assert max(collections.Counter(key for pair in pairs for key in pair.torch_keys).values()) == 1


def test_all_that_is_wrong_is_named_at_once(variables):
    state_dict = to_torch(variables, CFG)
    moved = state_dict.pop("decoder9.block.2.running_var")
    state_dict["decoder9.block.2.var"] = moved
    del state_dict["embedding.position_embeddings"]
    state_dict["transformer.layers.0.0.fn.qkv.bias"] = np.zeros((24,))
    with pytest.raises(WeightsError) as error:
        from_torch(state_dict, CFG)
    assert str(error.value).splitlines() == [
        "state dict: 4 keys do not fit the model",
        "  missing: embedding.position_embeddings (1, 12, 24)",
        "  missing: decoder9.block.2.running_var (64,)",
        "  unexpected: decoder9.block.2.var (64,)",
        "  shape: transformer.layers.0.0.fn.qkv.bias is (24,), must be (72,)",
    ]


def test_misfit_variables_are_named_by_path(variables):
    broken = jax.tree.map(lambda x: x, variables)
    broken["params"]["decoder"]["head"]["scale"] = broken["params"]["decoder"]["head"].pop("bias")
    with pytest.raises(WeightsError) as error:
        to_torch(broken, CFG)
    assert "missing: params/decoder/head/bias (3,)" in str(error.value)
    assert "unexpected: params/decoder/head/scale (3,)" in str(error.value)


def test_counters_may_be_there(variables):
    state_dict = to_torch(variables, CFG)
    state_dict["decoder9.block.2.num_batches_tracked"] = np.int64(7)
    state_dict["n_averaged"] = np.int64(3)
    state_dict["epoch"] = 5
    assert_same(from_torch(state_dict, CFG), variables)


def test_gradients_need_no_statistics(variables):
    state_dict = to_torch({"params": variables["params"]}, CFG)
    assert len(state_dict) == len(jax.tree.leaves(variables["params"]))
    assert not any("running" in key for key in state_dict)


def test_arrays_need_no_torch():
    code = """
import sys
class NoTorch:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTorch())
import jax, numpy as np
from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.weights import from_torch, to_torch
cfg = UNETRConfig.reference((16, 16, 16), 1, 2, 16, hidden_size=8, num_heads=2)
shapes = abstract_variables(UNETR(cfg))
variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
from_torch(to_torch(variables, cfg), cfg)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
