"""From the last tokens to logits: which token the head reads, or that it reads each, or gives logits to each pixel."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vir_jax.models.batch_norm import Affine, BatchNorm
from vir_jax.models.layers import LAYER_NORM_EPSILON, linear_init
from vir_jax.models.layout import Layout
from vir_jax.models.pixels import join_patches

Reads = Literal["class_token", "average", "every_token", "dense_linear", "dense_patch"]
READOUTS: tuple[Reads, ...] = get_args(Reads)

DENSE: tuple[Reads, ...] = ("dense_linear", "dense_patch")
"""Those that give logits to each pixel."""

POOLS: tuple[Reads, ...] = tuple(reads for reads in READOUTS if reads not in DENSE)
"""The others, which read tokens."""


class Readout(nnx.Module):
    """Norm and linear head on the class token, on the average of the patch tokens (of both passes where two) or all.

    A head that reads every token starts at zero: its first prediction says nothing.

    Two give logits to each pixel. "dense_linear": each patch token has one set of them, which are interpolated
    bilinearly between the patches' centres, as linear heads on frozen features have it (DINOv2). "dense_patch": each
    patch token has those of all its pixels, so that nothing is interpolated, and no pixel waits for the row below.

    The norm follows the readout: to one token it is the same as normalising all, and the average of the patch tokens
    has a norm of its own (docs/method.md, section 3), with no more parameters.

    Parameters: `norm.*`, `head.kernel [c, classes]`, of "dense_patch" `[c, patch, patch, classes]`, `head.bias`.
    """

    def __init__(self, dim: int, num_classes: int, reads: Reads, *, patch: int, rngs: nnx.Rngs) -> None:
        self.reads, self.patch, self.num_classes = reads, patch, num_classes
        self.norm: nnx.LayerNorm | BatchNorm | Affine = nnx.LayerNorm(
            dim, epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, rngs=rngs
        )
        self.head: nnx.Linear | nnx.LinearGeneral
        if reads == "dense_patch":
            self.head = nnx.LinearGeneral(
                dim,
                (patch, patch, num_classes),
                dtype=jnp.float32,
                kernel_init=linear_init,
                kernel_metadata={"axes": ("embed", None, None, "classes")},
                bias_metadata={"axes": (None, None, "classes")},
                rngs=rngs,
            )
        else:
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
        if self.reads in DENSE:
            return self.of_pixels(layout.patch_map(x))
        if self.reads == "every_token":
            return self.logits(layout.patch_tokens(x))
        if self.reads == "average":
            return self.logits(jnp.mean(layout.patch_tokens(x), axis=1))
        return self.logits(x[:, -1] if layout.class_token == "last" else x[:, 0])

    @property
    def streams(self) -> bool:
        """Whether what is predicted of a row of patches is known once it is read."""
        return self.reads != "dense_linear"

    def multiply_adds(self, layout: Layout) -> int:
        """Count the head's multiply-adds of one image; interpolation is not counted."""
        read = layout.patches if self.reads in ("every_token", *DENSE) else 1
        return read * math.prod(self.head.kernel.shape)

    def logits(self, token: Float[Array, "*b c"]) -> Float[Array, "*b classes"]:
        """Return the logits of what was read."""
        return self.head(self.norm(token))

    def of_pixels(self, tokens: Float[Array, "b rows cols c"]) -> Float[Array, "b H W classes"]:
        """Return the logits of each pixel of these rows of patches, in a dense model."""
        logits = self.head(self.norm(tokens))
        if self.reads == "dense_patch":
            return join_patches(logits.reshape(*tokens.shape[:3], -1), self.patch)
        return _enlarged(logits, self.patch)


def _enlarged(x: Float[Array, "b rows cols k"], factor: int) -> Float[Array, "b H W k"]:
    """Interpolate bilinearly; beyond the outermost centres stand their values."""
    b, rows, cols, k = x.shape
    # As `jax.image.resize`, which would compute the weights in float64 where that is on.
    return jax.image.scale_and_translate(
        x,
        (b, factor * rows, factor * cols, k),
        spatial_dims=(1, 2),
        scale=jnp.full(2, factor, jnp.float32),
        translation=jnp.zeros(2, jnp.float32),
        method="bilinear",
    )
