"""From the maps of a pyramid's stages to logits."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vir_jax.models.batch_norm import Affine, BatchNorm
from vir_jax.models.layout import Layout
from vir_jax.models.readout import Readout, Reads


class PyramidReadout(Readout):
    """Batch norm of every token of the last stage, their average, and a linear head: `norm`, `head`.

    Args:
        dim: channels of the last stage.
        num_classes: outputs.
        reads: what the head reads.
        patch: pixels between two places of what it reads, where it gives logits to each pixel.
        head_dim: channels that the head reads; None: `dim`.
        rngs: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        reads: Reads = "average",
        patch: int = 1,
        head_dim: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(dim, num_classes, reads, patch=patch, head_dim=head_dim, rngs=rngs)
        self.norm = BatchNorm(dim, rngs=rngs)

    def of_stages(
        self, maps: Sequence[Float[Array, "b _ _ _"]], image_size: Sequence[int]
    ) -> Float[Array, "b *n classes"]:
        """Return the logits, float32. The statistics are those of tokens, not of their average.

        Args:
            maps: of each stage, before it is halved.
            image_size: (height, width) in pixels.
        """
        return self.head(jnp.mean(self.norm(maps[-1]), axis=(1, 2)))

    def multiply_adds_of_stages(self, grids: Sequence[Sequence[int]]) -> int:
        """Count the head's multiply-adds of one image, whose maps have so many rows and columns."""
        return self.multiply_adds(Layout(cols=grids[-1][1], patches=math.prod(grids[-1]), class_token=None))

    def fold(self) -> None:
        """Make the norm a factor and a summand of each channel."""
        if isinstance(self.norm, BatchNorm):
            self.norm = Affine(self.norm)
