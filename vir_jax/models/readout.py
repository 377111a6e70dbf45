"""From the last tokens to logits: which token the head reads, or that it reads each."""

from typing import Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vir_jax.models.batch_norm import Affine, BatchNorm
from vir_jax.models.layers import LAYER_NORM_EPSILON, linear_init
from vir_jax.models.layout import Layout

Reads = Literal["class_token", "average", "every_token"]
READOUTS: tuple[Reads, ...] = get_args(Reads)


class Readout(nnx.Module):
    """Norm and linear head on the class token, on the average of the patch tokens (of both passes where two) or all.

    A head that reads every token starts at zero: its first prediction says nothing.

    The norm follows the readout: to one token it is the same as normalising all, and the average of the patch tokens
    has a norm of its own (docs/method.md, section 3), with no more parameters.
    """

    def __init__(self, dim: int, num_classes: int, reads: Reads, *, rngs: nnx.Rngs) -> None:
        self.reads = reads
        self.norm: nnx.LayerNorm | BatchNorm | Affine = nnx.LayerNorm(
            dim, epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, rngs=rngs
        )
        self.head = nnx.Linear(
            dim,
            num_classes,
            dtype=jnp.float32,
            kernel_init=nnx.initializers.zeros if reads == "every_token" else linear_init,
            kernel_metadata={"axes": ("embed", "classes")},
            bias_metadata={"axes": ("classes",)},
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b n c"], layout: Layout) -> Float[Array, "b *n classes"]:
        """Return the logits, float32, of the last block's tokens."""
        if self.reads == "every_token":
            return self.logits(layout.patch_tokens(x))
        if self.reads == "average":
            return self.logits(jnp.mean(layout.patch_tokens(x), axis=1))
        return self.logits(x[:, -1] if layout.class_token == "last" else x[:, 0])

    def multiply_adds(self, layout: Layout) -> int:
        """Count the head's multiply-adds of one image."""
        read = layout.patches if self.reads == "every_token" else 1
        return read * self.head.in_features * self.head.out_features

    def logits(self, token: Float[Array, "*b c"]) -> Float[Array, "*b classes"]:
        """Return the logits of what was read."""
        return self.head(self.norm(token))
