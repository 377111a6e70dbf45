"""What fine-tuning does to an optimiser: parts of the model that stay as they are, and slower ones."""

import fnmatch
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from vir_jax.parallel.sharding import dotted
from vir_jax.runs.state import Params

BLOCKS = "blocks."

T = TypeVar("T")


def freeze(optimizer: optax.GradientTransformation, patterns: Sequence[str]) -> optax.GradientTransformation:
    """Return an optimiser that leaves some parameters alone, and keeps no state for them.

    Gradients are clipped by the norm of the others alone, where `optimizer` clips them.

    Args:
      optimizer: of the others.
      patterns: dotted names of parameters, with * for anything: "stem.*", "*.bias".

    Raises:
      ValueError: when the state is made: a pattern that no parameter has, or nothing left to train.
    """

    def is_trained(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: not _matches(dotted(path), patterns), params)

    def init(params: Params) -> Any:
        names = [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                parts = sorted({name.split(".")[0] for name in names})
                raise ValueError(
                    f"config.optim.freeze has {pattern!r}, which no parameter is called; expected names such as"
                    f" {names[0]!r}, with * for anything, or a part of the model, {', '.join(f'{p}.*' for p in parts)}"
                )
        if all(_matches(name, patterns) for name in names):
            raise ValueError(f"config.optim.freeze is {','.join(patterns)!r}: nothing is left to train")
        return chain.init(params)

    def is_frozen(params: Params) -> Params:
        return jax.tree.map(lambda trained: not trained, is_trained(params))

    chain = optax.chain(optax.masked(optimizer, is_trained), optax.masked(optax.set_to_zero(), is_frozen))
    return optax.GradientTransformation(init, chain.update)


def without_gradients(train: Callable[..., T], patterns: Sequence[str]) -> Callable[..., T]:
    """Return a function of parameters through which no gradient comes to some of them.

    What lies below all that is trained is then not differentiated at all: a linear probe costs little more than the
    forward pass.

    Args:
      train: of (params, ...).
      patterns: as for `freeze`.
    """

    def stopped(params: Params, *args: Any, **options: Any) -> T:
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.lax.stop_gradient(leaf) if _matches(dotted(path), patterns) else leaf,
            params,
        )
        return train(params, *args, **options)

    return stopped if patterns else train


def frozen_names(freeze: str) -> list[str]:
    """Return the patterns in `config.optim.freeze`, which are separated by commas."""
    return [pattern.strip() for pattern in freeze.split(",") if pattern.strip()]


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Return layer-wise learning-rate decay: updates times decay^(layers above).

    The head and what else follows the blocks has 1, the last of L blocks `decay`, the first decay^L, the stem
    decay^(L + 1) (.65 to .75 are usual for ViTs). What stands between two stages of a pyramid goes with the block
    before it. Weight decay slows down as well.
    """

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        factors = layer_factors(updates, decay)
        return jax.tree.map(lambda update, factor: update * factor, updates, factors), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def layer_factors(params: Params, decay: float) -> Params:
    """Return the factors of `scale_by_layer`, each broadcasting to its parameter, of stacked blocks one for each.

    Args:
      params: or their shapes.
      decay: of a layer.
    """
    leaves = [(dotted(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    # "stage.", or of a pyramid "stages.0.parts.0.", ...: in the order of computation, with how many blocks each has.
    depths = {name.split(BLOCKS)[0]: leaf.shape[0] for name, leaf in leaves if BLOCKS in name}
    depth = sum(depths.values())

    ends = dict(zip(depths, itertools.accumulate(depths.values()), strict=True))

    def factor(path: tuple[Any, ...], leaf: Any) -> Array:
        name = dotted(path)
        if BLOCKS in name:
            end = ends[name.split(BLOCKS)[0]]
            layers = depth - end + jnp.arange(leaf.shape[0], 0, -1, dtype=jnp.float32)
            return (decay**layers).reshape(-1, *(1,) * (leaf.ndim - 1))
        if name.startswith("stages."):
            number = name.split(".")[1]
            end = max(end for stage, end in ends.items() if stage.split(".")[1] == number)
            return jnp.float32(decay ** (depth - end + 1))
        return jnp.float32(decay ** (depth + 1) if name.startswith("stem.") else 1.0)

    return jax.tree_util.tree_map_with_path(factor, params)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
