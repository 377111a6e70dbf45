"""The convolutional parts of a pyramid: stem, blocks and what halves a map between stages.

Their convolutions are 3 x 3 with one row and column of zeros around the map, on all sides, whatever the stride. So one
of stride 2 makes ceil(n / 2) rows of n, the centre of its window on rows 0, 2, 4, ...; maps of any size can be read.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from vir_jax.models.batch_norm import EPSILON, BatchNorm
from vir_jax.models.convolution import convolve
from vir_jax.models.layers import conv_init, drop_path, gelu
from vir_jax.models.layout import Layout
from vir_jax.models.linear import add_bias
from vir_jax.models.mixers import State
from vir_jax.models.sharding import constrain
from vir_jax.models.stage import StageBlock
from vir_jax.models.stem import check_images

WINDOW = 3
STEM_EPSILON = 1e-4
"""What the batch norms of the stem add to the variance."""

STEM_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}
"""Of the stem's two convolutions, by the stride that they have together."""

Maps = Float[Array, "b rows cols c"]
Axes = tuple[str | None, str | None]


class Conv(nnx.Module):
    """A convolution with zeros around the map, 3 x 3 where nothing else is said.

    Parameters: `kernel [window, window, c, d]`, and `bias [d]` where it has one.

    Args:
        inputs: channels c.
        outputs: channels d.
        window: places along a side of the kernel, odd.
        stride: in rows and columns.
        use_bias: whether there is a bias.
        axes: names of c and d (`vir_jax.models.sharding`).
        dtype: of the computation.
        rngs: of the parameters.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        window: int = WINDOW,
        stride: int = 1,
        use_bias: bool,
        axes: Axes,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.stride, self.dtype, self.axes = stride, dtype, axes
        self.padding = ((window // 2, window // 2),) * 2
        shape = (window, window, inputs, outputs)
        self.kernel = nnx.Param(conv_init(rngs.params(), shape, jnp.float32), axes=(None, None, *axes))
        bias = nnx.Param(jnp.zeros(outputs, jnp.float32), axes=(_activation(axes[1]),)) if use_bias else None
        self.bias: nnx.Param[Array] | None = nnx.data(bias)

    def __call__(
        self, maps: Maps, *, padding: Sequence[tuple[int, int]] | None = None
    ) -> Float[Array, "b y x d"]:
        """Convolve maps, in the dtype of the computation.

        Args:
            maps: of any size.
            padding: zeros before and after, in rows and columns; None: half a window on all sides.
        """
        kernel, stride = self.kernel[...].astype(self.dtype), (self.stride, self.stride)
        out = convolve(maps.astype(self.dtype), kernel, stride, self.padding if padding is None else padding)
        return out if self.bias is None else add_bias(out, self.bias[...])

    def multiply_adds(self, places: int) -> int:
        """Count those of so many places of its output."""
        return places * math.prod(self.kernel.shape[-4:])  # Of stacked layers, those of one.

    def scaled(self, norm: BatchNorm) -> "Conv":
        """Return the convolution that does what this one and a batch norm of its outputs do in evaluation."""
        factor, summand = norm.affine()
        conv = nnx.clone(self)
        conv.kernel[...] = self.kernel[...] * factor[..., None, None, None, :]
        bias = summand if self.bias is None else summand + factor * self.bias[...]
        conv.bias = nnx.Param(bias, axes=(_activation(self.axes[1]),))
        return conv


class ConvNorm(nnx.Module):
    """A convolution and the batch norm of its outputs: `conv`, `norm`. The result is float32.

    Args:
        conv: the convolution. A bias of it is taken away again by the norm; the published pyramids' blocks have one.
        epsilon: of the norm.
        name: of the convolution's outputs, for `vir_jax.models.stage.REMAT`; None: they are not kept.
        rngs: of the norm's parameters.
    """

    def __init__(self, conv: Conv, *, epsilon: float, name: str | None = None, rngs: nnx.Rngs) -> None:
        self.conv, self.name = conv, name
        self.norm: BatchNorm | None = nnx.data(BatchNorm(conv.kernel.shape[-1], epsilon=epsilon, rngs=rngs))

    def __call__(
        self, maps: Maps, *, padding: Sequence[tuple[int, int]] | None = None
    ) -> Float[Array, "b y x d"]:
        """Convolve and normalise; see `Conv`."""
        x = constrain(self.conv(maps, padding=padding), "batch", None, None, _activation(self.conv.axes[1]))
        x = x if self.name is None else checkpoint_name(x, self.name)
        return x.astype(jnp.float32) if self.norm is None else self.norm(x)

    @property
    def stride(self) -> int:
        """Of the convolution."""
        return self.conv.stride

    def fold(self) -> None:
        """Make one convolution of both, which no longer learns the statistics."""
        if self.norm is not None:
            self.conv, self.norm = self.conv.scaled(self.norm), nnx.data(None)


def _activation(axis: str | None) -> str | None:
    """Return the name of an activation's channels: the residual stream's are not split."""
    return "hidden" if axis == "hidden" else None


class PyramidStem(nnx.Module):
    """Two 3 x 3 convolutions, each with batch norm and ReLU: images to the tokens of the first stage, and their layout.

    Args:
        channels: of the images.
        hidden: channels between the two.
        dim: channels of a token.
        stride: pixels between two tokens, 1, 2 or 4 (`STEM_STRIDES`).
        dtype: of the computation.
        rngs: of the parameters.
    """

    passes, streams = 1, True

    def __init__(
        self, *, channels: int, hidden: int, dim: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.channels, self.dim, self.patch = channels, dim, stride
        first, second = STEM_STRIDES[stride]

        def convolution(inputs: int, outputs: int, stride: int) -> ConvNorm:
            conv = Conv(
                inputs,
                outputs,
                stride=stride,
                use_bias=False,
                axes=(None, "embed"),
                dtype=dtype,
                rngs=rngs,
            )
            return ConvNorm(conv, epsilon=STEM_EPSILON, rngs=rngs)

        self.conv1, self.conv2 = convolution(channels, hidden, first), convolution(hidden, dim, second)

    def layout(self, image_size: Sequence[int]) -> Layout:
        """Return where the tokens of an image of (height, width) pixels stand.

        Raises:
            ValueError: a side without pixels.
        """
        height, width = image_size
        if min(height, width) < 1:
            raise ValueError(
                f"an image of {height} x {width} pixels has none; expected at least one each way"
            )
        rows, cols = (-(-side // self.patch) for side in (height, width))
        return Layout(cols=cols, patches=rows * cols, class_token=None)

    def __call__(
        self, images: Float[Array, "b H W channels"]
    ) -> tuple[Float[Array, "b n c"], Layout, dict[str, Array]]:
        """Embed images of any size: the tokens, float32, their layout, and "tokens" by name.

        Raises:
            ValueError: images of another shape or dtype.
        """
        check_images(images.shape, images.dtype, self.channels)
        maps = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))
        x = maps.reshape(maps.shape[0], -1, self.dim)
        return x, self.layout(images.shape[1:3]), {"tokens": x}

    def multiply_adds(self, image_size: Sequence[int]) -> int:
        """Count those of one image of (height, width) pixels."""
        height, width = image_size
        first = self.conv1.conv.stride
        between = -(-height // first) * -(-width // first)
        return self.conv1.conv.multiply_adds(between) + self.conv2.conv.multiply_adds(
            self.layout(image_size).patches
        )


class ConvBlock(StageBlock):
    """x += DropPath(BN(conv3x3(GELU(BN(conv3x3(x)))))): 18 c^2 + 6 c parameters, and no LayerScale.

    The residual stream is float32, as in `vir_jax.models.stage.Block`.
    """

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def convolution(axes: Axes, name: str) -> ConvNorm:
            conv = Conv(dim, dim, use_bias=True, axes=axes, dtype=dtype, rngs=rngs)
            return ConvNorm(conv, epsilon=EPSILON, name=name, rngs=rngs)

        self.conv1 = convolution(("embed", "hidden"), "hidden")
        self.conv2 = convolution(("hidden", "embed"), "mlp")

    @property
    def intermediate_names(self) -> tuple[str, ...]:
        """The block's output alone."""
        return ("tokens",)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        layout: Layout,
        *,
        mode: str = "auto",
        drop_path_rate: float | Float[Array, ""] = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "b n c"], State | None, dict[str, Array]]:
        """Apply the block; see `Block.__call__`. There is no mixer, whose form `mode` could be."""
        update = self.conv2(gelu(self.conv1(layout.patch_map(x))))
        x = x + drop_path(update.reshape(x.shape), drop_path_rate, key)
        return x, None, {"tokens": x}

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count those of both convolutions, whatever the mode."""
        return sum(conv.conv.multiply_adds(layout.patches) for conv in (self.conv1, self.conv2))
