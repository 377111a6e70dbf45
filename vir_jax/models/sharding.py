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
    """Say how an activation is split, where a mesh is set (`jax.set_mesh`).

    Left to itself the partitioner may follow the parameters instead and split the channels, which then travel
    between devices at every layer norm. It is left to itself along a dimension that the mesh does not divide, and on
    axes of other names.

    Args:
        x: the activation.
        *dimensions: see `Dimensions`.
    """
    spec = [
        axes if axes and size % _parts(axes) == 0 else None
        for axes, size in zip(map(_mesh_axes, dimensions), x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if any(spec) else x


def on_each_device(
    function: Callable[..., Any], arguments: Sequence[Dimensions], results: Sequence[Dimensions]
) -> Callable[..., Any]:
    """Return `function` as every device computes it from its own part of the arguments, where a mesh is set.

    For kernels, which the partitioner cannot split. Along the dimensions that are split, parts must not depend on each
    other.

    Args:
        function: of arrays, to a tuple of arrays; None may stand for any of them.
        arguments: the dimensions of each.
        results: those of each result; a name has one size, that of an argument which is not None.

    Raises:
        ValueError: when called under a mesh that does not divide a dimension, or has several devices along an axis that
            splits none, so that devices would compute the same.
    """

    def run(*values: Array | None) -> Any:
        if not _automatic():
            return function(*values)
        sizes = {
            name: size
            for value, dimensions in zip(values, arguments, strict=True)
            if value is not None
            for name, size in zip(dimensions, value.shape, strict=True)
            if name is not None
        }
        _check_split(sizes)

        def spec(dimensions: Dimensions) -> PartitionSpec:
            return PartitionSpec(*(_mesh_axes(name) or None for name in dimensions))

        return jax.shard_map(
            function,
            in_specs=tuple(map(spec, arguments)),
            out_specs=tuple(map(spec, results)),
            axis_names=set(_automatic()),
        )(*values)

    return run


def _check_split(sizes: dict[str, int]) -> None:
    """Check that every axis which has devices splits one of these dimensions, in equal parts."""
    mesh = jax.sharding.get_abstract_mesh().shape
    what_to_do = "Choose another mesh, or compute without a kernel: implementation='xla'."
    splitting = {name: _mesh_axes(name) for name in sizes}
    for name, axes in splitting.items():
        if sizes[name] % _parts(axes):
            over = {axis: mesh[axis] for axis in axes}
            raise ValueError(
                f"a kernel computes on each device its part of {name}={sizes[name]}, which the mesh axes {over} do not "
                f"divide; expected a multiple of {_parts(axes)}. {what_to_do}"
            )
    used = {axis for axes in splitting.values() for axis in axes}
    idle = {axis: mesh[axis] for axis in _automatic() if mesh[axis] > 1 and axis not in used}
    if idle:
        expected = {name: MESH_AXES[name] for name in sizes}
        raise ValueError(
            f"a kernel computes on each device its part, and the mesh axes {idle} split nothing: each of their devices "
            f"would compute everything; expected axes of the names {expected}. {what_to_do}"
        )


def _automatic() -> tuple[str, ...]:
    """Return the axes of the mesh in context, if any, along which the partitioner splits."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if kind == AxisType.Auto)


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    """Return those of the automatic axes that split a dimension."""
    automatic = _automatic()
    return () if name is None else tuple(axis for axis in MESH_AXES[name] if axis in automatic)


def _parts(axes: Sequence[str]) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)
