"""How far training moves each kind of parameter, and where the gradients are."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vir_jax.parallel.sharding import dotted

# What a parameter is for, by its dotted path; the first that is found in it applies.
KINDS: tuple[tuple[str, str], ...] = (
    ("LayerScale", r"layer_scale"),
    ("class token", r"class_token$"),
    ("position embedding", r"(position\.embedding|position_embedding)$"),
    ("norm", r"norm\d*\.scale$"),
    ("statistics", r"norm\d*\.(mean|var)$"),  # Of batches: no gradient moves them.
    ("bias", r"bias$"),
    ("head", r"(^|\.)head\.kernel$"),
    ("kernel", r"kernel$"),
    ("other", r""),
)


class Movement(NamedTuple):
    """Root mean squares over all numbers of a group of parameters: of themselves, and of what was added to them."""

    size: Float[Array, ""]
    moved: Float[Array, ""]


def kind_of(path: str) -> str:
    """Return the kind, of `KINDS`, of the parameter with a dotted path."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, path))


def movement(before: Any, after: Any, group_of: Callable[[str], str] = kind_of) -> dict[str, Movement]:
    """Compute how far the parameters have moved, by group.

    Args:
        before: parameters, a nested dict.
        after: the same, some steps later.
        group_of: dotted path -> group; `str` makes a group of each array.
    """
    groups: dict[str, list[tuple[Array, Array]]] = {}
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        groups.setdefault(group_of(dotted(path)), []).append((old, new - old))

    def rms(arrays: tuple[Array, ...]) -> Float[Array, ""]:
        return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in arrays) / sum(x.size for x in arrays))

    return {group: Movement(*map(rms, zip(*pairs, strict=True))) for group, pairs in groups.items()}


def norms_by_block(gradients: Any) -> dict[str, Float[Array, "..."]]:
    """Compute the norm of each block's gradients, `[l]` by the path of the stacked blocks, and of all "others" `[]`."""
    squares: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        names = dotted(path).split(".")
        stacked = "blocks" in names
        group = ".".join(names[: names.index("blocks") + 1]) if stacked else "others"
        square = jnp.sum(jnp.square(leaf), axis=tuple(range(stacked, leaf.ndim)))
        squares[group] = squares.get(group, 0.0) + square
    return {group: jnp.sqrt(square) for group, square in squares.items()}
