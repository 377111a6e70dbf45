"""How a model is split over a device mesh: one table for its parameters, one for its activations.

A mesh has the axes data, fsdp and tensor. Data and fsdp split the batch; fsdp splits each parameter besides, which is
then gathered where it is used; tensor splits heads and hidden units.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Shaped

# Ordered rules: a pattern searched at the end of a dotted parameter path, and the mesh axis of each dimension; the
# first that matches applies. l blocks, c width of the residual stream, h heads, d width of a head, f hidden width of
# the MLP.
PARAMETERS: tuple[tuple[str, PartitionSpec], ...] = (
    (r"blocks\.mixer\.qkv\.kernel", PartitionSpec(None, "fsdp", None, "tensor", None)),  # l c 3 h d
    (r"blocks\.mixer\.qkv\.bias", PartitionSpec(None, None, "tensor", None)),  # l 3 h d
    (r"blocks\.mixer\.out\.kernel", PartitionSpec(None, "tensor", None, "fsdp")),  # l h d c
    (r"blocks\.mlp\.up\.kernel", PartitionSpec(None, "fsdp", "tensor")),  # l c f
    (r"blocks\.mlp\.up\.bias", PartitionSpec(None, "tensor")),  # l f
    (r"blocks\.mlp\.down\.kernel", PartitionSpec(None, "tensor", "fsdp")),  # l f c
    (r"head\.kernel", PartitionSpec("fsdp", "tensor")),  # c classes
    (r"head\.bias", PartitionSpec("tensor")),  # classes
    (r"patch_embedding\.kernel", PartitionSpec(None, None, None, "fsdp")),  # y x rgb c
    (r"position_embedding", PartitionSpec(None, None, None, "fsdp")),  # 1 y x c
    (r".*", PartitionSpec()),  # Norms, LayerScale, remaining biases, class token, counters: replicated.
)

# Dimensions of activations; those not named here are not split.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "heads": ("tensor",),
    "hidden": ("tensor",),
}


Dimensions = Sequence[str | None]
"""The name of each dimension in `ACTIVATIONS`, None for one that is not split."""


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
    axes = () if name is None else ACTIVATIONS[name]
    known = all(types.get(axis) == AxisType.Auto for axis in axes)
    return axes if axes and known and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
