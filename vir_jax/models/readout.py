"""From the last tokens to logits: which token the head reads, or that it reads each, or gives logits to each pixel."""

import math
from typing import Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vir_jax.models.batch_norm import Affine, BatchNorm
from vir_jax.models.interpolation import enlarge
from vir_jax.models.layers import LAYER_NORM_EPSILON, linear_init
from vir_jax.models.layout import Layout
from vir_jax.models.pixels import join_patches

Reads = Literal["class_token", "average", "every_token", "dense_linear", "dense_patch", "dense_upernet"]
READOUTS: tuple[Reads, ...] = get_args(Reads)

DENSE: tuple[Reads, ...] = ("dense_linear", "dense_patch", "dense_upernet")
"""Those that give logits to each pixel."""

POOLS: tuple[Reads, ...] = tuple(reads for reads in READOUTS if reads not in DENSE)
"""The others, which read tokens."""


class Readout(nnx.Module):
    """Norm and linear head on the class token, on the average of the patch tokens (of both passes where two) or all.

    A head that reads every token starts at zero: its first prediction says nothing.

    Some give logits to each pixel. "dense_linear": each patch token has one set of them, which are interpolated
    bilinearly between the patches' centres, as linear heads on frozen features have it (DINOv2). "dense_patch": each
    patch token has those of all its pixels, so that nothing is interpolated, and no pixel waits for the row below.
    "dense_upernet" is in `vir_jax.models.upernet`.

    The norm follows the readout: to one token it is the same as normalising all, and the average of the patch tokens
    has a norm of its own (docs/method.md, section 3), with no more parameters.

    Parameters: `norm.*`, `head.kernel [c, classes]`, of "dense_patch" `[c, patch, patch, classes]`, `head.bias`.

    Args:
        dim: channels c of the tokens.
        num_classes: outputs.
        reads: what the head reads.
        patch: pixels along a side.
        head_dim: channels that the head reads, where something is between norm and head; None: `dim`.
        rngs: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        reads: Reads,
        *,
        patch: int,
        head_dim: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
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
                head_dim or dim,
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

    def check_streamable(self) -> None:
        """Check that what is predicted of a row of patches is known once it and the one below are read.

        Raises:
            ValueError: it is not, and why.
        """
        if self.reads == "dense_upernet":
            raise ValueError(
                "a model with readout='dense_upernet' cannot be streamed: its head averages the whole map, so that no "
                "pixel is known before the last row is read. Use one made with readout='dense_patch' or 'dense_linear' "
                "(isotropic models have these), or give this one the whole image."
            )

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
        return self._interpolated(logits)

    @property
    def waits_below(self) -> bool:
        """Whether pixels are interpolated between a row of patches and the one below."""
        return self.reads == "dense_linear"

    @property
    def waiting(self) -> int:
        """Rows of pixels of a row of patches whose logits depend on the row below: those below its centres."""
        return self.patch // 2 if self.waits_below else 0

    def of_next_pixels(
        self,
        tokens: Float[Array, "b rows cols c"],
        above: Float[Array, "b 1 cols classes"] | None,
        first: Bool[Array, ""],
    ) -> tuple[Float[Array, "b H W classes"], Float[Array, "b 1 cols classes"] | None]:
        """Return the logits of the next pixels of an image that is read row by row, in a dense model.

        Args:
            tokens: of the next rows of patches.
            above: where pixels wait for a row below, the logits of the row of patches above.
            first: whether there is none: `above` is not read then.

        Returns:
            As many rows of logits as the patches have pixels: from those that waited, in the row above, to those of the
            last row of patches that do not; and the logits of this, the next call's `above`. In front of the first row
            of patches those that would have waited are above the image.
        """
        if not self.waits_below:
            return self.of_pixels(tokens), None
        assert above is not None
        logits = self.logits(tokens)
        rows = jnp.concatenate([jnp.where(first, logits[:, :1], above), logits], axis=1)
        return self._interpolated(rows)[:, self.patch - self.waiting : -self.waiting or None], rows[:, -1:]

    def of_last_pixels(self, last: Float[Array, "b 1 cols classes"]) -> Float[Array, "b H W classes"]:
        """Return the logits of the pixels that wait for a row below, where there is none."""
        return self._interpolated(last)[:, self.patch - self.waiting :]

    def _interpolated(self, logits: Float[Array, "b rows cols classes"]) -> Float[Array, "b H W classes"]:
        """Return the logits of pixels between those of patches."""
        return enlarge(logits, [self.patch * side for side in logits.shape[1:3]], self.patch)
