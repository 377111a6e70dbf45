"""A pyramid of feature maps from a single one, for detectors: ViTDet's (Li et al. 2022, arXiv 2203.16527)."""

import math
from collections.abc import Sequence

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vir_jax.models.convolution import convolve
from vir_jax.models.layers import LAYER_NORM_EPSILON, gelu

ENLARGED = (4, 2, 1, 0.5)
"""Places along a side of each map to one of the map that is read."""

KERNEL_AXES = (None, None, None, "embed")
"""Names of a kernel's dimensions (`vir_jax.models.sharding`)."""


class SimplePyramid(nnx.Module):
    """Maps of 1/4, 1/2, 1, 2 and 4 times the stride of the one that is read: of 16 pixels those of 4, 8, 16, 32 and 64.

    4 x: two deconvolutions of 2 x 2, which halve the channels each, norm and GELU between them; 2 x: one; 1/2: the
    maximum of each 2 x 2. Then of each a 1 x 1 and a 3 x 3 convolution without bias, a norm after either. The coarsest
    map is every second place of the one before it. Norms are over channels.

    A map of odd sides is halved upwards: of its last row and column, alone.

    Args:
        dim: channels of the map that is read.
        stride: its pixels from one place to the next, the patch of a model.
        out_dim: channels of every map.
        coarsest: whether there is a fifth map.
        dtype: of the computation.
        rngs: of the parameters.

    Raises:
        ValueError: channels that cannot be halved twice.
    """

    def __init__(
        self,
        dim: int,
        *,
        stride: int = 16,
        out_dim: int = 256,
        coarsest: bool = True,
        dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        if dim % 4:
            raise ValueError(f"dim={dim}; expected a multiple of 4, for the channels are halved twice")
        self.stride, self.out_dim, self.coarsest = stride, out_dim, coarsest

        def norm(channels: int) -> nnx.LayerNorm:
            return nnx.LayerNorm(channels, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)

        def deconvolution(channels: int) -> nnx.ConvTranspose:
            return nnx.ConvTranspose(
                channels,
                channels // 2,
                (2, 2),
                (2, 2),
                padding="VALID",
                dtype=dtype,
                kernel_metadata={"axes": KERNEL_AXES},
                rngs=rngs,
            )

        def convolution(channels: int, side: int) -> nnx.Conv:
            return nnx.Conv(
                channels,
                out_dim,
                (side, side),
                use_bias=False,
                dtype=dtype,
                kernel_metadata={"axes": KERNEL_AXES},
                rngs=rngs,
            )

        self.by_four = nnx.List([deconvolution(dim), norm(dim // 2), deconvolution(dim // 2)])
        self.by_two = deconvolution(dim)
        self.project = nnx.List(convolution(channels, 1) for channels in (dim // 4, dim // 2, dim, dim))
        self.project_norms = nnx.List(norm(out_dim) for _ in ENLARGED)
        self.smooth = nnx.List(convolution(out_dim, 3) for _ in ENLARGED)
        self.smooth_norms = nnx.List(norm(out_dim) for _ in ENLARGED)

    @property
    def strides(self) -> tuple[float, ...]:
        """Pixels from one place to the next in each map."""
        return (*(self.stride / factor for factor in ENLARGED), *((4.0 * self.stride,) * self.coarsest))

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each map."""
        return (self.out_dim,) * len(self.strides)

    def grids(self, grid: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return (rows, columns) of each map, made of one of `grid`."""
        four = tuple(tuple(math.ceil(factor * side) for side in grid) for factor in ENLARGED)
        coarsest = tuple(-(-side // 2) for side in four[-1])
        return (*four, *((coarsest,) * self.coarsest))

    def multiply_adds(self, grid: Sequence[int]) -> int:
        """Count those of one map of (rows, columns)."""
        # Each of three deconvolutions has 2 c^2 for a place of the map that is read: two of them 4 c c / 2, that of an
        # enlarged map four times 4 (c / 2) (c / 4).
        deconvolutions = 6 * self.by_two.in_features**2 * math.prod(grid)
        return deconvolutions + sum(
            math.prod(own) * (math.prod(one.kernel.shape) + math.prod(three.kernel.shape))
            for own, one, three in zip(self.grids(grid), self.project, self.smooth, strict=False)
        )

    def __call__(self, x: Float[Array, "b rows cols c"]) -> tuple[Float[Array, "b _rows _cols d"], ...]:
        """Return the maps, the finest first.

        Args:
            x: a map of features, as `VisionModel.feature_maps` gives one.
        """
        first, norm, second = self.by_four
        four = second(gelu(norm(first(x))))
        pooled = nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        maps = []
        for level, source in enumerate((four, self.by_two(x), x, pooled)):
            projected = self.project_norms[level](_convolved(self.project[level], source))
            maps.append(self.smooth_norms[level](_convolved(self.smooth[level], projected)))
        return (*maps, *((maps[-1][:, ::2, ::2],) * self.coarsest))


def _convolved(conv: nnx.Conv, x: Float[Array, "b rows cols c"]) -> Float[Array, "b rows cols d"]:
    x, kernel = conv.promote_dtype((x, conv.kernel[...]), dtype=conv.dtype)
    border = conv.kernel.shape[0] // 2
    return convolve(x, kernel, (1, 1), ((border, border), (border, border)))
