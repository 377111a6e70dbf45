"""Performer in which no token sees a later one: a sum that goes on, token after token, as retention without decay."""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads
from vir_jax.models.mixers.mixer import State, register
from vir_jax.models.mixers.performer import Features, Performer, exponents, positive, query_features
from vir_jax.ops import MODES, retention
from vir_jax.ops.sequence import CHUNK_SIZE

LARGEST_EXPONENT = 60.0
"""exp of it times many tokens is finite in float32. W k - |k|^2 / 2 is at most |w|^2 / 2, about d / 2: only heads wider
than about 64 channels can reach it."""


@register("performer_causal")
class CausalPerformer(Performer):
    """o_n = phi(q_n) S_n / (phi(q_n) z_n), S_n and z_n being the sums of phi(k)^T v and phi(k) up to token n.

    Retention with a decay of 1 computes both at once: values have one more channel, of ones, whose output is the
    denominator. So it has retention's modes, and its state, `[b, h, r, d + 1]` float32. Keys' features are not divided
    by the largest of all tokens, which the first ones cannot know.
    """

    causal = True
    modes = MODES

    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """Attend to the tokens so far by sums that go on."""
        projection = self.draw()
        queries, keys = query_features(q, projection), causal_key_features(k, projection)
        values = jnp.pad(v.astype(jnp.float32), ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1.0)
        no_decay = jnp.zeros(self.heads, jnp.float32)
        assert not isinstance(state, tuple)
        out, state = retention(queries, keys, values, no_decay, mode=mode, initial_state=state, scale=1.0)
        return (out[..., :-1] / out[..., -1:]).astype(v.dtype), state

    def initial_state(self, batch: int, layout: Layout) -> State:
        """Return zeros: the sums of each head."""
        return jnp.zeros((batch, self.heads, self.features, self.head_dim + 1), jnp.float32)

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count features of q and k, and retention with keys of r channels, as docs/method.md, section 6, does."""
        self.check_call(mode, None, False)
        n, r, e = layout.length, self.features, self.head_dim + 1
        chunkwise = n * self.heads * ((r + e) * min(CHUNK_SIZE, n) + 2 * r * e)
        counts = {
            "parallel": n * n * self.heads * (r + e),
            "recurrent": 5 * n * self.heads * r * e // 2,
            "chunkwise": chunkwise,
            "auto": chunkwise,
        }
        return 2 * n * r * self.dim + counts[mode]


def causal_key_features(k: Heads, projection: Float32[Array, "r d"]) -> Features:
    """Compute phi(k), of each token by itself."""
    products, norms = exponents(k, projection)
    return positive(jnp.minimum(products - norms, LARGEST_EXPONENT))
