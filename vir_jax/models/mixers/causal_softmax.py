"""Causal softmax attention: ViT's mixer where tokens come one after another, with a cache of keys and values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads, HeadsMixer
from vir_jax.models.mixers.mixer import State, register
from vir_jax.ops.attention import attention, scores_computed
from vir_jax.ops.contract import contract, matmul_precision

Queries = Float[Array, "b h n d"]
Keys = Float[Array, "b h m d"]


@register("causal_softmax")
class CausalSoftmaxAttention(HeadsMixer):
    """Scaled dot-product attention of every token to those before and itself. The softmax is in float32.

    The state is a cache of the keys and one of the values of all N tokens of the image, `[b, h, N, d]` each, float32:
    as long from the start as they will be, so that every token is read by the same program, whose work is that of the
    last one. Heads come first because products read the cache as it lies then, and nothing of it is copied.

    Where an image is read whole, on a CPU scores are computed block by block and never stored, from 128 tokens on, and
    blocks of them that are hidden are not computed (`vir_jax.ops.attention`).
    """

    causal = True

    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """softmax(mask(Q K^T / sqrt(d))) V."""
        new = tuple(jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (k, v))
        if state is None:
            return attention(q, k, v, causal=True), new
        first, tokens = layout.start, 2
        cached = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, x, first, tokens)
            for old, x in zip(state, new, strict=True)
        )
        keys, values = (x.astype(v.dtype) for x in cached)
        return jnp.swapaxes(_attend(jnp.swapaxes(q, 1, 2), keys, values, first), 1, 2), cached

    def initial_state(self, batch: int, layout: Layout) -> State:
        """Return empty caches for all tokens of the layout.

        Raises:
            ValueError: the layout does not say how many there will be.
        """
        if layout.patches == 0:
            raise ValueError(
                "a cache of keys and values is as long as the image, and the image's height is not known. Read images "
                "whole, or use a mixer whose state is of one size, such as retention."
            )
        shape = batch, self.heads, layout.length, self.head_dim
        return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count scores and their product with the values, those too that the mask hides within a block."""
        self.check_call(mode, None, False)
        return 2 * scores_computed(layout.length, causal=True) * self.dim


def _attend(q: Queries, k: Keys, v: Keys, first: int | Array) -> Queries:
    """Compute the attention of some tokens, from number `first` on, to those of the keys that are not later."""
    precision = matmul_precision(q, k, v)
    scores = contract("bhnd,bhmd->bhnm", q * q.shape[-1] ** -0.5, k, precision)
    number = jnp.asarray(first, jnp.int32) + jnp.arange(q.shape[2], dtype=jnp.int32)
    seen = jnp.arange(k.shape[2], dtype=jnp.int32) <= number[:, None]
    masses = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(v.dtype)
    return contract("bhnm,bhmd->bhnd", masses, v, precision).astype(v.dtype)
