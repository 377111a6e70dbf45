"""Softmax attention: ViT's mixer."""

import jax

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads, HeadsMixer
from vir_jax.models.mixers.mixer import State, register


@register("softmax")
class SoftmaxAttention(HeadsMixer):
    """Scaled dot-product attention of every token to every other. The softmax is in float32."""

    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """softmax(Q K^T / sqrt(d)) V."""
        return jax.nn.dot_product_attention(q, k, v), None

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count scores and their product with the values, n^2 c each."""
        self.check_call(mode, None, False)
        return 2 * layout.length**2 * self.dim
