"""Gradients of a batch: summed in slices on each device, and over devices once.

Left to the partitioner, gradients are summed over devices where they arise: in every slice of gradient accumulation
anew, and in the dtype of the computation. Here each part of the mesh's data axis adds up its own, and the sums meet
once, in a dtype that is chosen. The axes fsdp and tensor remain the partitioner's: what they split, parameters and sums
of gradients, is never whole on a device, and so what they exchange cannot wait for the last slice.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Int, Key

from vir_jax.ops.platform import platform
from vir_jax.runs.state import Params
from vir_jax.training.example_keys import example_key

AXIS = "data"
Means = tuple[Params, Any]
"""Gradients and metrics, means over the examples."""


def mean_gradients(
    gradient: Callable[..., Means],
    params: Params,
    examples: tuple[Array, ...],
    key: Key[Array, ""],
    *,
    slices: int,
    reduce_dtype: str,
    apart: bool = True,
) -> Means:
    """Compute the means of gradients and metrics over a batch.

    They are the same on any mesh and in any number of slices, but for rounding. Not so where the examples of a slice
    meet (batch normalisation): on any mesh, but not in any number of slices.

    Args:
      gradient: (params, *examples, key) -> means over these examples. It draws by `example_key`s: the first axis of
        what it draws is that of the examples. What lies on the axes fsdp and tensor it may constrain.
      params: float32; not split over the data axis.
      examples: arrays [b ...], split over the data axis of the mesh in context, if any.
      key: of the batch.
      slices: the parts that each device computes one after another; divides its examples.
      reduce_dtype: of the sum over the data axis; within a device sums are float32.
      apart: whether no example looks at another. Else all devices compute as one, the partitioner sums over them in
        every slice, and in the dtype of the computation.

    Raises:
      ValueError: see `check_reduce_dtype`.
    """
    check_reduce_dtype(reduce_dtype, apart=apart)
    parts = _parts() if apart else 1
    per_part = examples[0].shape[0] // parts

    def of_part(params: Params, examples: tuple[Array, ...], key: Key[Array, ""], first: Array) -> Means:
        return _in_slices(gradient, params, examples, key, first[0], slices)

    def of_all(*arguments: Any) -> Means:
        gradients, metrics = of_part(*arguments)
        summed = jax.lax.psum(jax.tree.map(lambda leaf: leaf.astype(reduce_dtype), gradients), AXIS)
        gradients = jax.tree.map(lambda leaf, own: leaf.astype(own.dtype) / parts, summed, gradients)
        return gradients, jax.lax.pmean(metrics, AXIS)

    first = per_part * jnp.arange(parts, dtype=jnp.int32)
    if parts == 1:
        return of_part(params, examples, key, first)
    split, whole = PartitionSpec(AXIS), PartitionSpec()
    # The check would want every loop of a model to say which of its values differ between devices.
    return jax.shard_map(
        of_all, in_specs=(whole, split, whole, split), out_specs=whole, axis_names={AXIS}, check_vma=False
    )(params, examples, key, first)


def check_reduce_dtype(reduce_dtype: str, *, apart: bool) -> None:
    """Check that gradients can be summed in a dtype over the data axis of the mesh in context.

    Raises:
      ValueError: another one than float32, on CPU devices (compiling that sum, XLA would end the process) or where
        examples are not computed apart.
    """
    if reduce_dtype == "float32":
        return
    if not apart:
        raise ValueError(
            f"config.reduce_dtype is {reduce_dtype!r}, which a model with batch statistics does not use: its gradients"
            " are summed in the dtype of the computation; expected 'float32', the default"
        )
    if _parts() > 1 and platform() == "cpu":
        raise ValueError(
            f"config.reduce_dtype is {reduce_dtype!r}, in which XLA does not sum over CPU devices; expected 'float32'"
        )


def _parts() -> int:
    """Return into how many parts the mesh in context splits the data axis; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[AXIS] if types.get(AXIS) == AxisType.Auto else 1


def _in_slices(
    gradient: Callable[..., Means],
    params: Params,
    examples: tuple[Array, ...],
    key: Key[Array, ""],
    first: Int[Array, ""],
    slices: int,
) -> Means:
    """Compute the means over consecutive examples of the batch, beginning with number `first`, slice after slice."""
    if slices == 1:
        return gradient(params, *examples, example_key(key, start=first))

    def accumulate(total: Means, inputs: tuple[Int[Array, ""], tuple[Array, ...]]) -> tuple[Means, None]:
        number, examples = inputs
        means = gradient(params, *examples, example_key(key, start=first + number, step=slices))
        return jax.tree.map(jnp.add, total, means), None

    # Every slices-th example makes a slice, so that each device of the fsdp axis slices its own part of the batch.
    sliced = tuple(jnp.swapaxes(x.reshape(-1, slices, *x.shape[1:]), 0, 1) for x in examples)
    shapes = jax.eval_shape(gradient, params, *(x[0] for x in sliced), example_key(key))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, zeros, (jnp.arange(slices, dtype=jnp.int32), sliced))
    return jax.tree.map(lambda leaf: leaf / slices, total)
