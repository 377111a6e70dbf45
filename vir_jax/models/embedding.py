"""From pixels to a token for each patch: one linear layer, or convolutions that overlap."""

import math
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vir_jax.models.layers import LAYER_NORM_EPSILON, conv_init


class Patchify(nnx.Module):
    """A linear embedding of patches: a convolution whose stride is its window."""

    patches_are_apart: ClassVar[bool] = True

    def __init__(self, patch: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        window = (patch, patch)
        self.conv = nnx.Conv(
            3,
            dim,
            window,
            window,
            padding="VALID",
            dtype=dtype,
            kernel_init=conv_init,
            kernel_metadata={"axes": (None, None, None, "embed")},
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b rows cols c"]:
        """Embed every patch; the result is float32."""
        return self.conv(images).astype(jnp.float32)

    def multiply_adds(self, grid: tuple[int, int]) -> int:
        """Count the multiply-adds for an image of (rows, columns) patches."""
        return math.prod(grid) * math.prod(self.conv.kernel.shape)


class ConvEmbedding(nnx.Module):
    """3 x 3 convolutions instead of the linear embedding, layer norm over channels and GELU between them.

    Of a patch of 2^s pixels the first s halve the image, and there are three at least. The last has `dim` channels,
    each before it half as many as the next. Zeros stand beyond the border. A token sees its neighbours' patches, too.

    Parameters: `convs.i`, `norms.i`.
    """

    name: ClassVar[str] = "conv"
    patches_are_apart: ClassVar[bool] = False
    between: ClassVar[bool] = True

    def __init__(self, patch: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        halvings = patch.bit_length() - 1
        if patch != 2**halvings:
            raise ValueError(
                f"stem={self.name!r} halves the image again and again: expected a patch of 1, 2, 4, ... pixels, a "
                f"power of 2, got {patch}"
            )
        count = max(3, halvings)
        if dim % 2 ** (count - 1):
            raise ValueError(
                f"stem={self.name!r} doubles its channels {count - 1} times, to {dim} at last: expected a multiple of "
                f"{2 ** (count - 1)}"
            )
        widths = [3, *(dim >> (count - 1 - i) for i in range(count))]
        self.strides = (2,) * halvings + (1,) * (count - halvings)
        self.convs = nnx.List(
            nnx.Conv(
                before,
                after,
                (3, 3),
                stride,
                padding=((1, 1), (1, 1)),
                dtype=dtype,
                kernel_init=conv_init,
                kernel_metadata={"axes": (None, None, None, "embed")},
                rngs=rngs,
            )
            for before, after, stride in zip(widths, widths[1:], self.strides, strict=False)
        )
        self.norms = nnx.List(
            nnx.LayerNorm(width, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
            for width in widths[1:-1]
            if self.between
        )

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b rows cols c"]:
        """Embed images; the result is float32."""
        x = images
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if self.between and i < len(self.norms):
                x = nnx.gelu(self.norms[i](x), approximate=False)
        return x.astype(jnp.float32)

    def multiply_adds(self, grid: tuple[int, int]) -> int:
        """Count the multiply-adds for an image of (rows, columns) patches."""
        total, shrinks = 0, math.prod(self.strides)
        for conv, stride in zip(self.convs, self.strides, strict=True):
            shrinks //= stride
            total += math.prod(grid) * shrinks**2 * math.prod(conv.kernel.shape)
        return total


class ViXEmbedding(ConvEmbedding):
    """The convolutions of Vision X-formers (arXiv 2107.02239): nothing is between them, so that they are linear.

    A 7 x 7 convolution of low rank, but for the border, of patches of one pixel; theirs has 32, 64 and 128 channels.
    """

    name = "conv_vix"
    between = False


Embedding = Patchify | ConvEmbedding

EMBEDDINGS: dict[str, type[Patchify] | type[ConvEmbedding]] = {
    "linear": Patchify,
    "conv": ConvEmbedding,
    "conv_vix": ViXEmbedding,
}
"""By the option `stem` of `create_model`."""
