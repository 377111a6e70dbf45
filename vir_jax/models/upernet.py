"""UPerNet (Xiao et al. 2018, arXiv 1807.10221): maps of several strides to logits of every pixel.

As in mmsegmentation's public code, without its dropout and its second, auxiliary head. The coarsest map is averaged
over 1, 4, 9 and 36 bins (PSPNet's pooling), so that each pixel sees the whole image; to each finer map the next coarser
one is added, enlarged; all are fused at the finest, between whose logits those of the pixels are interpolated.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vir_jax.models.batch_norm import EPSILON
from vir_jax.models.conv_stage import Conv, ConvNorm
from vir_jax.models.interpolation import average_pool, enlarge
from vir_jax.models.layers import LAYER_NORM_EPSILON
from vir_jax.models.layout import Layout
from vir_jax.models.pyramid_readout import PyramidReadout
from vir_jax.models.readout import Readout
from vir_jax.models.simple_pyramid import SimplePyramid

SIDES = (1, 2, 3, 6)
"""Bins along a side of the coarsest map, over which it is averaged."""

WIDTH = 512
"""Channels, where nothing else is said."""

FINEST = 4
"""Places of the finest map to a patch's side, in a model whose maps have one resolution."""

Maps = Sequence[Float[Array, "b _ _ _"]]
Grids = Sequence[Sequence[int]]


class UperNet(nnx.Module):
    """Maps, each of ceil(half) the rows and columns of the one before, to features at the places of the first.

    Every convolution is without bias, followed by batch norm and ReLU.

    Parameters, `w` being the width and `c` the channels of a map: `pooled.i [1, 1, c, w]` of each average,
    `context [3, 3, c + 4 w, w]`, `lateral.i [1, 1, c, w]` and `smooth.i [3, 3, w, w]` of each map but the coarsest,
    `fuse [3, 3, w maps, w]`; each has `conv.kernel` and `norm.*`. That is, with maps of c_1 to c_n channels,
    w (13 c_n + c_1 + ... + c_(n-1)) + (36 + 9 (n - 1) + 9 n) w^2 + 2 w (4 + 2 n).

    Args:
        dims: channels of the maps, the finest first.
        width: channels w of what is made of them.
        dtype: of the convolutions; norms and what they give are float32.
        rngs: of the parameters.
    """

    def __init__(self, dims: Sequence[int], width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def convolution(inputs: int, window: int) -> ConvNorm:
            axes = (None, "embed")
            conv = Conv(inputs, width, window=window, use_bias=False, axes=axes, dtype=dtype, rngs=rngs)
            return ConvNorm(conv, epsilon=EPSILON, rngs=rngs)

        *finer, coarsest = dims
        self.pooled = nnx.List(convolution(coarsest, 1) for _ in SIDES)
        self.context = convolution(coarsest + len(SIDES) * width, 3)
        self.lateral = nnx.List(convolution(dim, 1) for dim in finer)
        self.smooth = nnx.List(convolution(width, 3) for _ in finer)
        self.fuse = convolution(len(dims) * width, 3)

    def __call__(self, maps: Maps) -> Float[Array, "b rows cols w"]:
        """Return the fused features, float32."""
        *finer, coarsest = maps
        x = self._with_context(coarsest)
        merged = [x]
        for conv, finer_map in zip(reversed(self.lateral), reversed(finer), strict=True):
            x = nnx.relu(conv(finer_map)) + enlarge(x, finer_map.shape[1:3], 2)
            merged.insert(0, x)
        smooth = [nnx.relu(conv(x)) for conv, x in zip(self.smooth, merged, strict=False)]
        # The coarsest has just been through a convolution.
        levels = (*smooth, merged[-1])
        finest = maps[0].shape[1:3]
        together = [enlarge(x, finest, 2**level) if level else x for level, x in enumerate(levels)]
        return nnx.relu(self.fuse(jnp.concatenate(together, axis=-1)))

    def _with_context(self, x: Float[Array, "b rows cols c"]) -> Float[Array, "b rows cols w"]:
        """Return the coarsest map, each place of which has seen the averages."""
        size = x.shape[1:3]
        averages = [
            enlarge(nnx.relu(conv(average_pool(x, side))), size, [length / side for length in size])
            for conv, side in zip(self.pooled, SIDES, strict=True)
        ]
        return nnx.relu(self.context(jnp.concatenate([x, *averages], axis=-1)))

    def multiply_adds(self, grids: Grids) -> int:
        """Count those of its convolutions, of maps of so many rows and columns; interpolation is not counted."""
        places = [rows * cols for rows, cols in grids]
        pooled = sum(conv.conv.multiply_adds(side**2) for conv, side in zip(self.pooled, SIDES, strict=True))
        finer = sum(
            conv.conv.multiply_adds(count)
            for convs in (self.lateral, self.smooth)
            for conv, count in zip(convs, places, strict=False)
        )
        ends = self.context.conv.multiply_adds(places[-1]) + self.fuse.conv.multiply_adds(places[0])
        return pooled + finer + ends


class UperNetReadout(Readout):
    """UPerNet on maps of 1/4, 1/2, 1 and 2 patches that ViTDet's pyramid makes of the last block's map.

    Parameters: `norm.*`, `pyramid.*` (`SimplePyramid`), `decoder.*` (`UperNet`), `head.kernel [w, classes]`,
    `head.bias`.

    Args:
        dim: channels of the tokens.
        num_classes: outputs of each pixel.
        patch: pixels, 4 or more: the finest map has four places to a patch's side.
        width: channels w of all maps.
        dtype: of the convolutions.
        rngs: of the parameters.
    """

    def __init__(
        self, dim: int, num_classes: int, *, patch: int, width: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        super().__init__(dim, num_classes, "dense_upernet", patch=patch, head_dim=width, rngs=rngs)
        self.pyramid = SimplePyramid(dim, stride=patch, out_dim=width, coarsest=False, dtype=dtype, rngs=rngs)
        self.decoder = UperNet(self.pyramid.dims, width, dtype=dtype, rngs=rngs)

    def of_pixels(self, tokens: Float[Array, "b rows cols c"]) -> Float[Array, "b H W classes"]:
        """Return the logits of each pixel, float32, of a whole image's patches."""
        logits = self.head(self.decoder(self.pyramid(self.norm(tokens))))
        size = [self.patch * side for side in tokens.shape[1:3]]
        return enlarge(logits, size, self.patch / FINEST)

    def multiply_adds(self, layout: Layout) -> int:
        """Count those of one image; interpolation is not counted."""
        grids = self.pyramid.grids(layout.grid)
        return (
            self.pyramid.multiply_adds(layout.grid)
            + self.decoder.multiply_adds(grids)
            + _head_multiply_adds(self, grids)
        )


class PyramidUperNetReadout(PyramidReadout):
    """UPerNet on the maps that a pyramid's stages give before they are halved, each with a norm of its own.

    Parameters: `norms.i.*`, layer norms of all maps but the last; `norm.*`, the batch norm that the last one has before
    a classifier's head, too; `decoder.*` (`UperNet`), `head.kernel [w, classes]`, `head.bias`.

    Args:
        dims: channels of the maps.
        num_classes: outputs of each pixel.
        stride: pixels between two places of the first map.
        width: channels w of the decoder.
        dtype: of the convolutions.
        rngs: of the parameters.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        *,
        stride: int,
        width: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            dims[-1], num_classes, reads="dense_upernet", patch=stride, head_dim=width, rngs=rngs
        )
        self.norms = nnx.List(
            nnx.LayerNorm(dim, epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, rngs=rngs) for dim in dims[:-1]
        )
        self.decoder = UperNet(dims, width, dtype=dtype, rngs=rngs)

    def of_stages(self, maps: Maps, image_size: Sequence[int]) -> Float[Array, "b H W classes"]:
        """Return the logits of each pixel, float32."""
        norms = (*self.norms, self.norm)
        features = self.decoder([norm(x) for norm, x in zip(norms, maps, strict=True)])
        return enlarge(self.head(features), image_size, self.patch)

    def multiply_adds_of_stages(self, grids: Grids) -> int:
        """Count those of one image; interpolation is not counted."""
        return self.decoder.multiply_adds(grids) + _head_multiply_adds(self, grids)


def _head_multiply_adds(readout: Readout, grids: Grids) -> int:
    rows, cols = grids[0]
    return rows * cols * readout.head.kernel.size
