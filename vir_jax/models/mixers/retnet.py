"""RetNet's retention (arXiv 2307.08621), of which ViR's is a simplification: its decays, norms of heads and a gate."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads, HeadsMixer, to_heads
from vir_jax.models.mixers.mixer import State, register
from vir_jax.ops import MODES, retention, retnet_log_decay
from vir_jax.ops.sequence import CHUNK_SIZE

EPSILON = 1e-6


@register("retnet")
class RetNet(HeadsMixer):
    """swish(gate(x)) * RMSNorm(retention(Q, K, V)), in each head, with decays 1 - 2^(-5 - h).

    As published with `position="rope"`: its code turns queries and keys so, and leaves xPos's growing scales out. Its
    other normalisations (of the mask's rows and of the scores) change the length of an output alone, which the norm
    undoes. Values are as wide as queries; RetNet's are twice as wide. Without biases but that of the output.

    The state is `[b, h, d, d]` float32. Parameters besides those of every mixer with heads: `gate.kernel [c, h, d]`.
    """

    causal = True
    modes = MODES
    intermediate_names = ("q", "k", "v", "gain", "head_outputs")

    def __init__(self, dim: int, heads: int, layout: Layout, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(dim, heads, layout, qkv_bias=False, dtype=dtype, rngs=rngs)
        self.gate = to_heads(dim, (heads, self.head_dim), bias=False, dtype=dtype, rngs=rngs)

    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """O = (Q K^T .* D) V, or one of its equal forms."""
        assert not isinstance(state, tuple)
        return retention(q, k, v, retnet_log_decay(self.heads), mode=mode, initial_state=state)

    def gain(self, x: Float[Array, "b n c"], outputs: Heads) -> Float32[Array, "b n h d"]:
        """Return swish(gate(x)) divided by each head's root mean square."""
        gate = checkpoint_name(self.gate(x), "gate").astype(jnp.float32)
        squares = jnp.mean(jnp.square(outputs.astype(jnp.float32)), axis=-1, keepdims=True)
        return jax.nn.silu(gate) * jax.lax.rsqrt(squares + EPSILON)

    def initial_state(self, batch: int, layout: Layout) -> State:
        """Return zeros: one d x d matrix per head."""
        return jnp.zeros((batch, self.heads, self.head_dim, self.head_dim), jnp.float32)

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count the gate, and retention as docs/method.md, section 6, does."""
        self.check_call(mode, None, False)
        n, c, d = layout.length, self.dim, self.head_dim
        chunkwise = 2 * n * c * (min(CHUNK_SIZE, n) + d)
        counts = {"parallel": 2 * n * n * c, "recurrent": 5 * n * c * d // 2}
        return n * c * c + (counts | {"chunkwise": chunkwise, "auto": chunkwise})[mode]
