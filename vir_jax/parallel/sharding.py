"""Where every leaf of a train state lies: the dimensions that parameters name, applied to a mesh.

Optimiser state and moving averages carry the parameters' paths and shapes, so that what holds for a parameter holds for
them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from vir_jax.models.sharding import MESH_AXES

LARGE = 2**20
"""Bytes above which an array that nothing splits is an error."""

Axes = Mapping[str, Sequence[str | None]]
"""The names of a parameter's last dimensions, by its dotted path."""


def dotted(path: tuple[Any, ...]) -> str:
    """Return a key path of `jax.tree_util` as text, `stage.blocks.mixer.qkv.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def parameter_axes(variables: Any) -> dict[str, tuple[str | None, ...]]:
    """Return how each variable of a model (`nnx.state`, abstract or not) names its dimensions, by dotted path.

    One that names none has the empty tuple.
    """
    flat = nnx.to_flat_state(variables)
    return {".".join(map(str, path)): tuple(v.get_metadata().get("axes", ())) for path, v in flat}


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, axes: Axes) -> Any:
    """Return the sharding of every leaf of a train state (arrays or their shapes).

    Raises:
        ValueError: an array above 1 MB that names no dimension to split, or none that the mesh divides.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(dotted(path), leaf, mesh, axes)), state
    )


def partition_spec(path: str, leaf: Any, mesh: Mesh | AbstractMesh, axes: Axes) -> PartitionSpec:
    """Return how a leaf of a train state is split.

    Args:
        path: dotted; it ends in a parameter's.
        leaf: with shape and dtype.
        mesh: with the axes of `MESH_AXES`.
        axes: of `parameter_axes`.

    Raises:
        ValueError: see `state_shardings`.
    """
    names = _names(path, leaf.shape, axes)
    wanted = [MESH_AXES[name][0] if name else None for name in names]
    spec = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(wanted, leaf.shape, strict=True)
    ]
    if math.prod(leaf.shape) * leaf.dtype.itemsize > LARGE:
        if not any(names):
            raise ValueError(
                f"{path} {leaf.shape} is larger than 1 MB and does not say how it is split over devices: name its "
                f"dimensions in the metadata `axes` where it is made; the names are {', '.join(MESH_AXES)}"
            )
        splitting = [axis for axis in wanted if axis and mesh.shape[axis] > 1]
        if splitting and not any(axis and mesh.shape[axis] > 1 for axis in spec):
            raise ValueError(
                f"{path} {leaf.shape} is larger than 1 MB, and no mesh axis divides it: "
                + ", ".join(f"{axis}={mesh.shape[axis]}" for axis in splitting)
            )
    return PartitionSpec(*spec)


def unsplit(params: Any, mesh: Mesh | AbstractMesh, axes: Axes) -> list[str]:
    """Return a line for each dimension that a mesh axis would split and does not divide."""
    lines = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        for name, size in zip(_names(dotted(path), leaf.shape, axes), leaf.shape, strict=True):
            axis = MESH_AXES[name][0] if name else None
            if axis is not None and size % mesh.shape[axis]:
                lines.append(f"{dotted(path)}: dimension of {size} over {axis}={mesh.shape[axis]}")
    return lines


def _names(path: str, shape: tuple[int, ...], axes: Axes) -> tuple[str | None, ...]:
    """Return the name of each dimension of the parameter whose path ends `path`.

    None for all of them where there is no such parameter, or the leaf is a reduced form of it, such as an optimiser's
    scalar.
    """
    parts = path.split(".")
    tails = (".".join(parts[start:]) for start in range(len(parts)))
    names = tuple(next((axes[tail] for tail in tails if tail in axes), ()))
    if len(names) > len(shape):
        return (None,) * len(shape)
    return (None,) * (len(shape) - len(names)) + names
