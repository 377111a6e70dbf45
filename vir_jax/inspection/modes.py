"""The modes side by side: how far their tokens differ, and what each costs as the image grows."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64

from vir_jax.inspection.decay import RetentionKind
from vir_jax.inspection.model import mixer_of, retention_kind
from vir_jax.models import VisionModel
from vir_jax.ops import MODES, retention, retention_2d, vir_log_decay

MEMORY_LIMIT = 2 * 2**30


class Cost(NamedTuple):
    """One layer's retention of one image in one mode."""

    mode: str
    grid: tuple[int, int]
    temp_bytes: int  # Of the compiled program, all but q, k, v and the output.
    ms: float | None  # Median; None where it was not run, for the memory it takes.


def tokens_by_mode(model: VisionModel, images: Float[Array, "b H W 3"]) -> dict[str, Float[Array, "b n c"]]:
    """Return tokens after the final norm, in every mode.

    Raises:
        ValueError: the model mixes tokens by another operator than retention, and has one mode alone.
    """
    retention_kind(mixer_of(model))
    graph, params = nnx.split(model)

    def features(params: Any, images: Array, mode: str) -> Array:
        return nnx.merge(graph, params).features(images, mode=mode)

    run = jax.jit(features, static_argnums=2)
    return {mode: run(params, images, mode) for mode in MODES}


def errors_by_token(
    tokens: Mapping[str, Float[Array, "b n *c"]],
) -> dict[tuple[str, str], Float64[np.ndarray, "n"]]:
    """Return, for each pair of modes, the relative RMS difference of every token.

    The RMS is taken over the batch and a token's channels, and divided by the RMS of the first mode's token; 0 where
    both are zero.

    Args:
        tokens: by mode; at least two, of one shape.
    """
    rows = {mode: np.moveaxis(np.asarray(x, np.float64), 1, 0) for mode, x in tokens.items()}
    flat = {mode: x.reshape(len(x), -1) for mode, x in rows.items()}
    errors = {}
    for first, second in itertools.combinations(flat, 2):
        difference = np.linalg.norm(flat[first] - flat[second], axis=1)
        size = np.linalg.norm(flat[first], axis=1)
        errors[first, second] = np.divide(difference, size, out=difference.copy(), where=size > 0)
    return errors


def retention_costs(
    heads: int,
    width: int,
    grids: Sequence[tuple[int, int]],
    kind: RetentionKind,
    *,
    rounds: int = 5,
    budget_s: float = 0.5,
) -> list[Cost]:
    """Time and temporary memory of retention over an image's patches and class token, by mode and size; float32.

    Compilation is not counted. A mode that wants more than MEMORY_LIMIT is compiled and not run.

    Args:
        heads: with ViR's decays.
        width: of a head.
        grids: (rows, columns) of patches.
        kind: "1d" or "2d".
        rounds: how many times each is run, at most, after the first.
        budget_s: seconds after which a mode is not run again at this size.
    """
    log_decay = vir_log_decay(heads)
    costs = []
    for grid in grids:
        shape = (3, 1, math.prod(grid) + 1, heads, width)
        tokens = jax.random.normal(jax.random.key(0), shape, jnp.float32)
        operator = retention if kind == "1d" else partial(retention_2d, grid=grid)
        for mode in MODES:
            run = _compiled(partial(operator, log_decay=log_decay, mode=mode), tokens)
            temp_bytes = _temp_bytes(run)
            seconds: list[float] = []
            while temp_bytes <= MEMORY_LIMIT and len(seconds) <= rounds and sum(seconds) < budget_s:
                started = time.perf_counter()
                jax.block_until_ready(run(*tokens))
                seconds.append(time.perf_counter() - started)
            # The first run is left out, unless it is the only one.
            ms = 1e3 * statistics.median(seconds[1:] or seconds) if seconds else None
            costs.append(Cost(mode, grid, temp_bytes, ms))
    return costs


def _compiled(operator: Callable[..., tuple[Array, Array]], tokens: Float[Array, "3 b n h d"]) -> Any:
    """Compile what gives the operator's output, without what is computed for its state alone."""
    return jax.jit(lambda q, k, v: operator(q, k, v)[0]).lower(*tokens).compile()


def _temp_bytes(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes
