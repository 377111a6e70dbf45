"""Causal softmax attention: ViT's mixer where tokens come one after another, with a cache of keys and values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads, HeadsMixer
from vir_jax.models.mixers.mixer import State, register


@register("causal_softmax")
class CausalSoftmaxAttention(HeadsMixer):
    """Scaled dot-product attention of every token to those before and itself. The softmax is in float32.

    The state is the cache `[b, 2, N, h, d]` of the keys and values of all N tokens of the image, float32: as long from
    the start as it will be, so that every token is read by the same program, whose work is that of the last one.
    """

    causal = True

    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """softmax(mask(Q K^T / sqrt(d))) V."""
        new = jnp.stack([k, v], axis=1).astype(jnp.float32)
        if state is None:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True), new
        assert not isinstance(state, tuple)
        first = layout.start
        cache = jax.lax.dynamic_update_slice_in_dim(state, new, first, axis=2)
        seen = _seen(first, layout.length, state.shape[2])
        keys, values = (cache[:, i].astype(v.dtype) for i in range(2))
        return jax.nn.dot_product_attention(q, keys, values, mask=seen), cache

    def initial_state(self, batch: int, layout: Layout) -> State:
        """Return an empty cache for all tokens of the layout.

        Raises:
            ValueError: the layout does not say how many there will be.
        """
        if layout.patches == 0:
            raise ValueError(
                "a cache of keys and values is as long as the image, and the image's height is not known. Read images "
                "whole, or use a mixer whose state is of one size, such as retention."
            )
        return jnp.zeros((batch, 2, layout.length, self.heads, self.head_dim), jnp.float32)

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count scores and their product with the values, n^2 c each, those that the mask hides too."""
        self.check_call(mode, None, False)
        return 2 * layout.length**2 * self.dim


def _seen(first: int | Array, length: int, cached: int) -> Bool[Array, "1 1 n m"]:
    """Return which of the cached tokens each of `length` tokens from number `first` on sees."""
    number = jnp.asarray(first, jnp.int32) + jnp.arange(length, dtype=jnp.int32)
    return (jnp.arange(cached, dtype=jnp.int32) <= number[:, None])[None, None]
