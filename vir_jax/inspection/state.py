"""The state of each head as an image is read: how much it holds, in how many directions, of how many patches."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from vir_jax.inspection.model import (
    arrival_decay,
    check_one_order,
    exact_einsum,
    layout_of,
    mixer_of,
    retention_kind,
)
from vir_jax.models import VisionModel
from vir_jax.models.layout import Layout


class StateSummary(NamedTuple):
    """Of the state S_t, d x e, after t = 0 .. patches patches; everything is 0 before the first.

    norm: Frobenius norm of S_t.
    effective_rank: exp of the entropy of the singular values divided by their sum (Roy and Vetterli, 2007): 1 for one
        direction, min(d, e) for equal singular values.
    patches_held: (sum_m w_m)^2 / sum_m w_m^2 of the weights w_m = D[t,m] |k_m| |v_m| by which S_t is made up of
        patches: how many patches of equal weight would be spread as they are. Equal keys and values give at most
        (1 + gamma) / (1 - gamma) in 1-D, by the decay alone.
    """

    norm: Float32[Array, "*lead h t"]
    effective_rank: Float32[Array, "*lead h t"]
    patches_held: Float32[Array, "*lead h t"]


def state_at(
    k: Float[Array, "b m h d"], v: Float[Array, "b m h e"], decay: Float32[Array, "h m"]
) -> Float32[Array, "b h d e"]:
    """Return S = sum_m D[m] k_m^T v_m, for one row of decays."""
    return exact_einsum("hm,bmhd,bmhe->bhde", decay, k, v)


def effective_rank(state: Float32[Array, "*lead d e"]) -> Float32[Array, "*lead"]:
    """Return exp(entropy of the normalised singular values); 0 for a state of zeros."""
    singular = jnp.linalg.svd(state, compute_uv=False)
    total = singular.sum(axis=-1)
    share = singular / jnp.where(total > 0, total, 1.0)[..., None]
    return jnp.where(total > 0, jnp.exp(jax.scipy.special.entr(share).sum(axis=-1)), 0.0)


def patches_held(weights: Float32[Array, "*lead m"]) -> Float32[Array, "*lead"]:
    """Return (sum w)^2 / sum w^2: m for equal weights, 1 for a single one, 0 for none."""
    squares = jnp.sum(weights**2, axis=-1)
    return jnp.where(squares > 0, jnp.sum(weights, axis=-1) ** 2 / jnp.where(squares > 0, squares, 1.0), 0.0)


def summarize_states(
    k: Float[Array, "b m h d"], v: Float[Array, "b m h e"], decay: Float32[Array, "h t m"]
) -> StateSummary:
    """Return norm, effective rank and patches held of every state, shape [b, h, t] each.

    Args:
        k: keys of the patches.
        v: values of the patches.
        decay: `decay_at_arrival`.
    """
    lengths = (jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in (k, v))
    strength = jnp.prod(jnp.stack([*lengths]), axis=0)

    def at(decay: Array) -> tuple[Array, Array, Array]:
        state = state_at(k, v, decay)
        weights = decay * jnp.swapaxes(strength, 1, 2)
        return jnp.linalg.norm(state, axis=(-2, -1)), effective_rank(state), patches_held(weights)

    over_time = jax.lax.map(at, jnp.moveaxis(decay, 1, 0))  # One state at a time is held.
    return StateSummary(*(jnp.moveaxis(x, 0, -1) for x in over_time))


def states_as_read(model: VisionModel, images: Float[Array, "b H W 3"]) -> StateSummary:
    """Return `summarize_states` of every layer, shape [b, l, h, t] each.

    Raises:
        ValueError: the model has no state, or none that decays by heads: it mixes tokens by another operator than
            retention, or its blocks read backwards.
    """
    retention_kind(mixer_of(model))
    check_one_order(model)
    return _states_as_read(*nnx.split(model), images)


@partial(jax.jit, static_argnums=0)
def _states_as_read(graph: Any, params: Any, images: Array) -> StateSummary:
    model = nnx.merge(graph, params)
    names = [[f"blocks.{layer}.mixer.{name}" for name in "kv"] for layer in range(model.depth)]
    found = model.intermediates(images, [name for pair in names for name in pair])
    grid = layout_of(model, images).grid
    layers = []
    for layer, (k, v) in enumerate(names):
        decay = arrival_decay(model.block(layer).mixer, found[k].shape[1], grid)
        layers.append(summarize_states(found[k][:, :-1], found[v][:, :-1], decay))
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *layers)


def state_bytes(model: VisionModel, grid: tuple[int, int]) -> int:
    """Return the bytes of all layers' states while an image is read: a matrix per head, in 2-D one for each column.

    With a short convolution also the few tokens that it needs.
    """
    layout = Layout(cols=grid[1], patches=0, class_token=None)
    state = jax.eval_shape(lambda: mixer_of(model).initial_state(1, layout))
    return model.depth * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
