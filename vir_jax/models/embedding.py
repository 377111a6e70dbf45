"""From pixels to a token for each patch: one linear layer, or convolutions that overlap."""

import math
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vir_jax.models.convolution import convolve
from vir_jax.models.layers import LAYER_NORM_EPSILON, conv_init, gelu
from vir_jax.models.linear import add_bias, product
from vir_jax.models.pixels import cut_patches

Above = tuple[Float[Array, "b _ _ _"], ...]
"""What an embedding remembers of the rows above: of each convolution, the last rows that it read."""


class Patchify(nnx.Module):
    """A linear embedding of patches: a convolution whose stride is its window, computed as one product."""

    reads_patches: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __init__(self, patch: int, dim: int, *, channels: int = 3, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        window = (patch, patch)
        # Holds the parameters, at the shapes that checkpoints and other libraries know.
        self.conv = nnx.Conv(
            channels,
            dim,
            window,
            window,
            padding="VALID",
            dtype=dtype,
            kernel_init=conv_init,
            kernel_metadata={"axes": (None, None, None, "embed")},
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "b H W channels"]) -> Float[Array, "b rows cols c"]:
        """Embed every patch; the result is float32."""
        # The gradient of a convolution by its kernel is slow on CPUs: a tenth of a step of configs/vir_cifar10.py.
        patches, kernel, bias = _promoted(self.conv, cut_patches(images, self.conv.kernel.shape[0]))
        return add_bias(product(patches, kernel.reshape(-1, kernel.shape[-1])), bias).astype(jnp.float32)

    def initial_state(self, batch: int, width: int) -> Above:
        """Return nothing: no patch depends on another."""
        return ()

    def read(
        self, pixels: Float[Array, "b H W channels"], above: Above
    ) -> tuple[Float[Array, "b rows cols c"], Above]:
        """Embed patches, wherever they stand."""
        return self(pixels), above

    def multiply_adds(self, grid: tuple[int, int]) -> int:
        """Count the multiply-adds for an image of (rows, columns) patches."""
        return math.prod(grid) * math.prod(self.conv.kernel.shape)


def _promoted(conv: nnx.Conv, x: Array) -> tuple[Array, Array, Array]:
    """Return x and kernel in the dtype of the computation, and the bias."""
    assert conv.bias is not None
    return x.astype(conv.dtype), conv.kernel[...].astype(conv.dtype), conv.bias[...]


class ConvEmbedding(nnx.Module):
    """3 x 3 convolutions instead of the linear embedding, layer norm over channels and GELU between them.

    Of a patch of 2^s pixels the first s halve the image, and there are three at least. The last has `dim` channels,
    each before it half as many as the next. Zeros stand beyond the border. A token sees pixels of the patches beside
    and above its own, and none below, so that an image can be read row by row: `read`.

    Parameters: `convs.i`, `norms.i`.
    """

    name: ClassVar[str] = "conv"
    reads_patches: ClassVar[bool] = False
    streams: ClassVar[bool] = True
    between: ClassVar[bool] = True

    def __init__(self, patch: int, dim: int, *, channels: int = 3, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
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
        self.widths = (channels, *(dim >> (count - 1 - i) for i in range(count)))
        self.strides = (2,) * halvings + (1,) * (count - halvings)
        # A stride of 2 leaves the row below the border unread, be there one or not.
        self.rows_above = tuple(3 - stride if self.streams else 1 for stride in self.strides)
        self.padding = (0, 0 if self.streams else 1), (1, 1)
        # They hold the parameters.
        self.convs = nnx.List(
            nnx.Conv(
                before,
                after,
                (3, 3),
                stride,
                padding=self.padding,
                dtype=dtype,
                kernel_init=conv_init,
                kernel_metadata={"axes": (None, None, None, "embed")},
                rngs=rngs,
            )
            for before, after, stride in zip(self.widths, self.widths[1:], self.strides, strict=False)
        )
        self.norms = nnx.List(
            nnx.LayerNorm(width, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
            for width in self.widths[1:-1]
            if self.between
        )

    def __call__(self, images: Float[Array, "b H W channels"]) -> Float[Array, "b rows cols c"]:
        """Embed images; the result is float32."""
        embedded, _ = self.read(images, self.initial_state(*images.shape[::2]))
        return embedded

    def initial_state(self, batch: int, width: int) -> Above:
        """Return zeros, which stand above an image that is `width` pixels wide."""
        rows = []
        for above, channels, stride in zip(self.rows_above, self.widths, self.strides, strict=False):
            rows.append(jnp.zeros((batch, above, width, channels), jnp.float32))
            width //= stride
        return tuple(rows)

    def read(
        self, pixels: Float[Array, "b H W channels"], above: Above
    ) -> tuple[Float[Array, "b rows cols c"], Above]:
        """Embed the next rows of images.

        Args:
            pixels: whole rows of patches.
            above: what the rows above left; `initial_state` at the top.

        Returns:
            Their patches, float32, and what they leave.
        """
        x, left = pixels, []
        for i, (conv, stride, rows) in enumerate(zip(self.convs, self.strides, above, strict=True)):
            x = jnp.concatenate([rows.astype(x.dtype), x], axis=1)
            left.append(x[:, x.shape[1] - rows.shape[1] :].astype(jnp.float32))
            x, kernel, bias = _promoted(conv, x)
            x = add_bias(convolve(x, kernel, (stride, stride), self.padding), bias)
            if self.between and i < len(self.norms):
                x = gelu(self.norms[i](x))
        return x.astype(jnp.float32), tuple(left)

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
    A token sees the rows below, too.
    """

    name = "conv_vix"
    streams = False
    between = False


Embedding = Patchify | ConvEmbedding

EMBEDDINGS: dict[str, type[Patchify] | type[ConvEmbedding]] = {
    "linear": Patchify,
    "conv": ConvEmbedding,
    "conv_vix": ViXEmbedding,
}
"""By the option `stem` of `create_model`."""
