"""Where the parameters of older checkpoints are found today."""

from collections.abc import Collection, Mapping
from typing import Any

import jax

# Until models had a stem, a stage and a readout, their parts stood side by side.
_RENAMED = {
    "patch_embedding": "stem.embedding.conv",
    "position_embedding": "stem.position.embedding",
    "class_token": "stem.class_token",
    "class_position_embedding": "stem.class_position_embedding",
    "blocks": "stage.blocks",
    "final_norm": "readout.norm",
    "head": "readout.head",
}
_PARTS = {name.split(".")[0] for name in _RENAMED.values()}


def is_old(names: Collection[str]) -> bool:
    """Return whether a stored model with these top-level names is from before the renaming."""
    return "blocks" in names


def to_old(tree: Any) -> Any:
    """Return a tree with its parameters where an older checkpoint has them.

    Args:
        tree: parameters, or anything that holds such nested dicts, such as an optimiser's state.
    """
    return jax.tree.map(lambda node: _to_old(node) if _is_model(node) else node, tree, is_leaf=_is_model)


def from_old(tree: Any) -> Any:
    """Return a tree of an older checkpoint with its parameters where they are found today; see `to_old`."""
    return jax.tree.map(
        lambda node: _from_old(node) if _is_old_model(node) else node, tree, is_leaf=_is_old_model
    )


def _is_model(node: Any) -> bool:
    return isinstance(node, dict) and set(node) == _PARTS


def _is_old_model(node: Any) -> bool:
    return isinstance(node, dict) and is_old(node)


def _to_old(model: Mapping[str, Any]) -> dict[str, Any]:
    return {old: part for old, new in _RENAMED.items() if (part := _get(model, new)) is not None}


def _from_old(model: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for old, part in model.items():
        *parents, name = _RENAMED[old].split(".")
        place = renamed
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = part
    return renamed


def _get(tree: Any, name: str) -> Any:
    for key in name.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
