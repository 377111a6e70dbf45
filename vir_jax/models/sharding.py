"""How a model is split over a device mesh: one table from the names of dimensions to mesh axes.

A mesh has the axes data, fsdp and tensor. Data and fsdp split the batch; fsdp splits each parameter besides, which is
then gathered where it is used; tensor splits heads and hidden units.

A parameter names its last dimensions where it is made, in its metadata `axes`; dimensions before them (that of stacked
blocks) are not split. Activations are named where `constrain` is called.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Shaped

MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),  # Width of the residual stream, of parameters alone.
    "heads": ("tensor",),
    "hidden": ("tensor",),  # Units of the MLP.
    "classes": ("tensor",),
}
"""The mesh axes that split a dimension of that name."""


Dimensions = Sequence[str | None]
"""The name of each dimension in `MESH_AXES`, None for one that is not split."""


def constrain(x: Shaped[Array, "..."], *dimensions: str | None) -> Shaped[Array, "..."]:
    """Says how an activation is split, where a mesh is set (`jax.set_mesh`) and divides it.

    Left to itself the partitioner may follow the parameters instead and split the channels, which then travel
    between devices at every layer norm.

    Args:
        x: the activation.
        *dimensions: see `Dimensions`.
    """
    spec = [_mesh_axes(name, size) for name, size in zip(dimensions, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if any(spec) else x


def on_each_device(
    function: Callable[..., Any], arguments: Sequence[Dimensions], results: Sequence[Dimensions]
) -> Callable[..., Any]:
    """`function` as every device computes it from its own part of the arguments, where a mesh is set.

    For kernels, which the partitioner cannot split. Along the dimensions that are split, parts must not depend on each
    other.

    Args:
        function: of arrays, to a tuple of arrays; None may stand for any of them.
        arguments: the dimensions of each.
        results: those of each result; a name has one size, that of an argument which is not None.
    """

    def run(*values: Array | None) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        axes = {
            axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto
        }
        if not axes:
            return function(*values)
        sizes = {
            name: size
            for value, dimensions in zip(values, arguments, strict=True)
            if value is not None
            for name, size in zip(dimensions, value.shape, strict=True)
        }

        def spec(dimensions: Dimensions) -> PartitionSpec:
            return PartitionSpec(*(name and _mesh_axes(name, sizes[name]) for name in dimensions))

        return jax.shard_map(
            function,
            in_specs=tuple(map(spec, arguments)),
            out_specs=tuple(map(spec, results)),
            axis_names=axes,
        )(*values)

    return run


def _mesh_axes(name: str | None, size: int) -> tuple[str, ...] | None:
    """Those that split a dimension: where a mesh is set that has them, is not manual, and divides it."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = () if name is None else MESH_AXES[name]
    known = all(types.get(axis) == AxisType.Auto for axis in axes)
    return axes if axes and known and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
