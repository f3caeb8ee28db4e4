"""The memory layout of slabs on TPU."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

LANES = 128


def compact(slab: jax.Array) -> jax.Array:
    """Returns [N, B, H, W, C], laid out without padding few channels to the lanes of the TPU.

    Left alone, the compiler pads for a loop's convenience what it then copies into another layout.
    The layout is a request: batched slabs and exported programs, in which JAX allows no layouts, do
    without it.
    """
    return slab if slab.shape[-1] % LANES == 0 else _columns_last.bind(slab)


def _constrain(slab):
    return with_layout_constraint(slab, Layout(major_to_minor=(0, 1, 2, 4, 3)))


def _lower(context, slab):
    if context.module_context.lowering_parameters.for_export:
        return [slab]
    return mlir.lower_fun(_constrain, multiple_results=False)(context, slab)


_columns_last = Primitive("columns_last")
_columns_last.def_impl(lambda slab: slab)
_columns_last.def_abstract_eval(lambda slab: slab)
mlir.register_lowering(_columns_last, _lower)
ad.deflinear(_columns_last, lambda cotangent: [cotangent])
batching.primitive_batchers[_columns_last] = lambda slabs, axes: (slabs[0], axes[0])
