"""Which mesh axes split which parameter: ordered rules, the first that matches applies.

A rule is a pattern searched at the end of a dotted parameter path, and the mesh axis of each dimension.
Optimiser state and moving averages carry the parameters' paths, so that the same rules place them.
"""

import re
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Kernels: c width of the residual stream, h heads, d width of a head, f hidden width of the MLP.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"mixer\.qkv\.kernel", PartitionSpec("fsdp", None, "tensor", None)),  # c 3 h d
    (r"mixer\.qkv\.bias", PartitionSpec(None, "tensor", None)),  # 3 h d
    (r"mixer\.out\.kernel", PartitionSpec("tensor", None, "fsdp")),  # h d c
    (r"mlp\.up\.kernel", PartitionSpec("fsdp", "tensor")),  # c f
    (r"mlp\.up\.bias", PartitionSpec("tensor")),  # f
    (r"mlp\.down\.kernel", PartitionSpec("tensor", "fsdp")),  # f c
    (r"head\.kernel", PartitionSpec("fsdp", "tensor")),  # c classes
    (r"head\.bias", PartitionSpec("tensor")),  # classes
    (r"patch_embedding\.kernel", PartitionSpec(None, None, None, "fsdp")),  # y x rgb c
    (r"position_embedding", PartitionSpec(None, None, None, "fsdp")),  # 1 y x c
    (r".*", PartitionSpec()),  # Norms, LayerScale, remaining biases, class token, counters: replicated.
)


def dotted(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as text, `blocks.0.mixer.qkv.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The first matching rule, less the axes that do not divide their dimension (logged)."""
    rule = next(spec for pattern, spec in RULES if re.search(rf"(^|\.)({pattern})$", path))
    if len(rule) > len(shape):  # A reduced form of the parameter, such as a scalar of an optimiser.
        return PartitionSpec()
    axes: list[str | None] = []
    for axis, size in zip(rule, shape, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            logging.warning("%s: dimension of %d is not split over %s=%d", path, size, axis, mesh.shape[axis])
            axis = None
        axes.append(axis)
    return PartitionSpec(*axes)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a train state (arrays or their shapes), by `RULES`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(dotted(path), leaf.shape, mesh)), state
    )
