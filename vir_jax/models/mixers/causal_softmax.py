"""Causal softmax attention: ViT's mixer where tokens come one after another, with a cache of keys and values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads, HeadsMixer
from vir_jax.models.mixers.mixer import State, register
from vir_jax.ops.contract import contract, matmul_precision

# A whole image's queries are taken in so many blocks, of no fewer tokens, each with the keys up to its end: what is
# hidden from all of a block is not computed, which on a CPU is three quarters of the time at 1,024 tokens, and no
# block's scores leave its caches. More blocks would be more to compile.
MAX_BLOCKS, MIN_BLOCK = 16, 128

Queries = Float[Array, "b h n d"]
Keys = Float[Array, "b h m d"]


@register("causal_softmax")
class CausalSoftmaxAttention(HeadsMixer):
    """Scaled dot-product attention of every token to those before and itself. The softmax is in float32.

    The state is a cache of the keys and one of the values of all N tokens of the image, `[b, h, N, d]` each, float32:
    as long from the start as they will be, so that every token is read by the same program, whose work is that of the
    last one. Heads come first because products read the cache as it lies then, and nothing of it is copied.
    """

    causal = True

    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """softmax(mask(Q K^T / sqrt(d))) V."""
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        new = tuple(x.astype(jnp.float32) for x in (k, v))
        if state is None:
            blocks = _blocks(layout.length)
            outputs = [
                _attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], start) for start, end in blocks
            ]
            return jnp.swapaxes(jnp.concatenate(outputs, axis=2), 1, 2), new
        first, tokens = layout.start, 2
        cached = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, x, first, tokens)
            for old, x in zip(state, new, strict=True)
        )
        keys, values = (x.astype(v.dtype) for x in cached)
        return jnp.swapaxes(_attend(q, keys, values, first), 1, 2), cached

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
        return sum(2 * (end - start) * end * self.dim for start, end in _blocks(layout.length))


def _attend(q: Queries, k: Keys, v: Keys, first: int | Array) -> Queries:
    """Compute the attention of some tokens, from number `first` on, to those of the keys that are not later."""
    precision = matmul_precision(q, k, v)
    scores = contract("bhnd,bhmd->bhnm", q * q.shape[-1] ** -0.5, k, precision)
    number = jnp.asarray(first, jnp.int32) + jnp.arange(q.shape[2], dtype=jnp.int32)
    seen = jnp.arange(k.shape[2], dtype=jnp.int32) <= number[:, None]
    masses = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(v.dtype)
    return contract("bhnm,bhmd->bhnd", masses, v, precision).astype(v.dtype)


def _blocks(length: int) -> list[tuple[int, int]]:
    """Return where blocks of tokens begin and end."""
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]
