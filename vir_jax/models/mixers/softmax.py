"""Softmax attention: ViT's mixer."""

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads, HeadsMixer
from vir_jax.models.mixers.mixer import State, register
from vir_jax.ops.attention import attention


@register("softmax")
class SoftmaxAttention(HeadsMixer):
    """Scaled dot-product attention of every token to every other. The softmax is in float32.

    On a CPU scores are computed block by block and never stored, from 128 tokens on (`vir_jax.ops.attention`).
    """

    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """softmax(Q K^T / sqrt(d)) V."""
        return attention(q, k, v), None

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count scores and their product with the values, n^2 c each."""
        self.check_call(mode, None, False)
        return 2 * layout.length**2 * self.dim
