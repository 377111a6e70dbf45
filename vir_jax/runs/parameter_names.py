"""Where older checkpoints keep the arrays of a train state.

Until models had a stem, a stage and a readout, their parts stood side by side; and optimisers kept a count of steps for
the schedule.
"""

from typing import Any

import jax

from vir_jax.parallel.sharding import dotted

_RENAMED = {
    "stem.embedding.conv": "patch_embedding",
    "stem.position.embedding": "position_embedding",
    "stem.class_token": "class_token",
    "stem.class_position_embedding": "class_position_embedding",
    "stage.blocks": "blocks",
    "readout.norm": "final_norm",
    "readout.head": "head",
}


def as_stored(wanted: Any, stored: Any) -> Any:
    """Return the arrays that are wanted, nested and named as they are stored.

    Args:
        wanted: shapes, dtypes and shardings.
        stored: shapes and dtypes of what the checkpoint holds; what of it is not wanted is restored all the same, and
            left out by `from_stored`.

    Raises:
        ValueError: something that is wanted is not stored.
    """
    if not _is_older(wanted, stored):
        return wanted
    found = {_old_name(dotted(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
    sharding = next(iter(found.values())).sharding

    def target(path: tuple[Any, ...], leaf: Any) -> Any:
        if (name := dotted(path)) in found:
            return found.pop(name)
        alone = jax.sharding.SingleDeviceSharding(next(iter(sharding.device_set)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=alone)

    tree = jax.tree_util.tree_map_with_path(target, stored)
    if found:
        raise ValueError(f"the checkpoint of an earlier version does not hold {', '.join(found)}")
    return tree


def from_stored(restored: Any, wanted: Any) -> Any:
    """Return what was restored of `as_stored(wanted, ...)` in the structure that is wanted."""
    if not _is_older(wanted, restored):
        return restored
    found = {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}
    paths, structure = jax.tree_util.tree_flatten_with_path(wanted)
    return jax.tree.unflatten(structure, [found[_old_name(dotted(path))] for path, _ in paths])


def _is_older(wanted: Any, stored: Any) -> bool:
    """Return whether they are a model's arrays, wanted by today's names and stored by others."""
    wanted_names, stored_names = (
        [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)] for tree in (wanted, stored)
    )
    return any("stage.blocks." in name for name in wanted_names) and not any(
        "stage.blocks." in name for name in stored_names
    )


def _old_name(name: str) -> str:
    """Return the dotted path of an array, a parameter or what an optimiser keeps for one, in an older checkpoint."""
    for today, before in _RENAMED.items():
        head, found, tail = name.partition(today + ".")
        if found and (not head or head.endswith(".")):
            return f"{head}{before}.{tail}"
        if name == today or name.endswith("." + today):
            return name.removesuffix(today) + before
    return name
