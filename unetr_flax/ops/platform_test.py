import jax
import jax.numpy as jnp
import pytest

from unetr_flax import ops
from unetr_flax.ops.platform import by_platform


def choose(x):
    branches = {"cpu": lambda x: x + 1, "tpu": lambda x: x + 2, "default": lambda x: x + 3}
    return by_platform(x, **branches)


@pytest.mark.parametrize(("platform", "result"), [("cpu", 1), ("tpu", 2)])
def test_only_the_branch_of_the_platform_is_traced(platform, result):
    traced = jax.make_jaxpr(ops.target_platform(platform)(choose))(0.0)
    assert [eqn.primitive.name for eqn in traced.eqns] == ["add"]
    assert float(ops.target_platform(platform)(choose)(jnp.zeros(()))) == result


def test_otherwise_the_program_picks_its_branch():
    for function in (choose, ops.target_platform("gpu")(choose)):
        assert len(jax.make_jaxpr(function)(0.0).eqns) > 1
        for platform, result in (("cpu", 1), ("tpu", 2), ("cuda", 3)):
            lowered = jax.jit(function).trace(0.0).lower(lowering_platforms=(platform,))
            assert f"dense<{result}.0" in lowered.as_text()


def test_what_was_traced_for_one_platform_is_not_used_for_another():
    jitted = jax.jit(choose)
    results = []
    for platform in ("tpu", "cpu", "gpu"):
        with ops.target_platform(platform):
            results.append(float(jitted(0.0)))
    assert [*results, float(jitted(0.0))] == [2, 1, 1, 1]


def test_the_platform_is_open_again_after_an_error():
    with pytest.raises(ArithmeticError), ops.target_platform("tpu"):
        raise ArithmeticError
    assert float(choose(jnp.zeros(()))) == 1
