import jax
import jax.numpy as jnp

from unetr_flax.ops.conv3x3x3 import cpu_subpixel


def test_coarse_grid_is_taken_where_it_needs_fewer_multiplications():
    def pays(voxels, inputs, middle, strides=(2, 2, 2)):
        return cpu_subpixel.pays(
            jax.ShapeDtypeStruct((1, voxels, 10, 10, inputs), jnp.float32),
            jax.ShapeDtypeStruct((*strides, inputs, middle), jnp.float32),
            jax.ShapeDtypeStruct((3, 3, 3, middle, middle), jnp.float32),
        )

    assert pays(10, 32, 16)
    assert not pays(10, 32, 16, (2, 1, 2))
    assert not pays(10, 96, 16)  # 64 * 96 * 16 per coarse voxel > 8 * (27 * 16 * 16 + 96 * 16)
    assert not pays(1, 64, 32)  # Composing the kernels costs more than all the rest.
