"""Where every leaf of a train state lies: `vir_jax.models.sharding.PARAMETERS`, applied to a mesh.

Optimiser state and moving averages carry the parameters' paths, so that the same rules place them.
"""

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from vir_jax.models.sharding import PARAMETERS


def dotted(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as text, `blocks.mixer.qkv.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The first matching rule, less the axes that do not divide their dimension."""
    rule = _rule(path)
    if len(rule) > len(shape):  # A reduced form of the parameter, such as a scalar of an optimiser.
        return PartitionSpec()
    axes = (
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for axis, size in zip(rule, shape, strict=False)
    )
    return PartitionSpec(*axes)


def state_shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of every leaf of a train state (arrays or their shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(dotted(path), leaf.shape, mesh)), state
    )


def unsplit(params: Any, mesh: Mesh | AbstractMesh) -> list[str]:
    """A line for each dimension that a rule would split and the mesh does not divide."""
    lines = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = dotted(path)
        for axis, size in zip(_rule(name), leaf.shape, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                lines.append(f"{name}: dimension of {size} over {axis}={mesh.shape[axis]}")
    return lines


def _rule(path: str) -> PartitionSpec:
    return next(spec for pattern, spec in PARAMETERS if re.search(rf"(^|\.)({pattern})$", path))
