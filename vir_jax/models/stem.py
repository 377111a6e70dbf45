"""From images to tokens and their layout: patch embedding, positions, class token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from vir_jax.models.embedding import EMBEDDINGS, Embedding
from vir_jax.models.layout import ClassTokenPlace, Layout
from vir_jax.models.position import POSITIONS


class Stem(nnx.Module):
    """Patch embedding, position embedding and class token (docs/method.md, section 3).

    Parameters: `embedding`, `position.embedding [1, rows, cols, c]` (only where learned), `class_token [1, 1, c]`
    (unless there is none), `class_position_embedding [1, 1, c]` (only where positions are added and the class token
    comes first; a last one has no position).
    """

    def __init__(
        self,
        *,
        embedding: str,
        image_size: tuple[int, int],
        patch: int,
        channels: int,
        dim: int,
        position: str,
        class_token: ClassTokenPlace | None,
        passes: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.patch, self.channels, self.dim = patch, channels, dim
        self.place, self.passes = class_token, passes
        normal = nnx.initializers.normal
        self.embedding: Embedding = EMBEDDINGS[embedding](
            patch, dim, channels=channels, dtype=dtype, rngs=rngs
        )
        self.position = POSITIONS[position](patch_grid(image_size, patch), dim, rngs=rngs)
        self.class_token = (
            None if class_token is None else nnx.Param(normal(1e-6)(rngs.params(), (1, 1, dim), jnp.float32))
        )
        self.class_position_embedding = (
            nnx.Param(normal(0.02)(rngs.params(), (1, 1, dim), jnp.float32))
            if class_token == "first" and self.position.embeds
            else None
        )

    def layout(self, image_size: Sequence[int]) -> Layout:
        """Return where the tokens of an image of (height, width) pixels stand.

        Raises:
            ValueError: the patch does not divide the image.
        """
        rows, cols = patch_grid(image_size, self.patch)
        return Layout(cols=cols, patches=rows * cols, class_token=self.place, passes=self.passes)

    def __call__(
        self, images: Float[Array, "b H W channels"]
    ) -> tuple[Float[Array, "b n c"], Layout, dict[str, Array]]:
        """Embed images.

        Returns:
            The tokens in sequence order, float32; their layout; and by name the intermediates: "patch_tokens"
            `[b, rows * cols, c]`, the patches' embeddings without position, and "tokens", the first result.

        Raises:
            ValueError: images of another shape or dtype, or that the patch does not divide.
        """
        check_images(images.shape, images.dtype, self.channels)
        layout = self.layout(images.shape[1:3])
        patches = self.embedding(images)
        x = (patches + self.position.of_grid(layout.grid)).reshape(patches.shape[0], layout.patches, self.dim)
        if self.passes == 2:
            x = jnp.concatenate([x, jnp.flip(x, axis=1)], axis=1)
        if self.place is not None:
            class_token = self.class_tokens(x.shape[0])
            x = jnp.concatenate([class_token, x] if self.place == "first" else [x, class_token], axis=1)
        return x, layout, {"patch_tokens": patches.reshape(x.shape[0], -1, self.dim), "tokens": x}

    @property
    def streams(self) -> bool:
        """Whether no token depends on a row of pixels below its patch, so that an image can be read in pieces."""
        return self.embedding.streams

    def multiply_adds(self, layout: Layout) -> int:
        """Count the embedding's multiply-adds of one image."""
        return self.embedding.multiply_adds(layout.grid)

    def class_tokens(self, batch: int) -> Float[Array, "b 1 c"]:
        """Return the class token of every image, in a model that has one."""
        assert self.class_token is not None
        token = self.class_token[...]
        if self.class_position_embedding is not None:
            token = token + self.class_position_embedding[...]
        return jnp.broadcast_to(token, (batch, 1, self.dim))

    def cut(
        self, pixels: Num[Array, "b H W colours"], y: Int[Array, " n"], x: Int[Array, " n"]
    ) -> Num[Array, "b*n p p colours"]:
        """Return the pixels of the patches in rows y and columns x of the grid, those of one image together."""
        p = self.patch
        size, zero = (pixels.shape[0], p, p, pixels.shape[-1]), jnp.int32(0)
        cut = jax.vmap(
            lambda y, x: jax.lax.dynamic_slice(pixels, (zero, y * p, x * p, zero), size), out_axes=1
        )
        return cut(y, x).reshape(-1, p, p, pixels.shape[-1])

    def cut_rows(
        self, pixels: Num[Array, "b H W colours"], first: Int[Array, ""], rows: int
    ) -> Num[Array, "b _ W colours"]:
        """Return the pixels of so many rows of the grid."""
        return jax.lax.dynamic_slice_in_dim(pixels, first * self.patch, rows * self.patch, axis=1)


def patch_grid(image_size: Sequence[int], patch: int) -> tuple[int, int]:
    """Return (rows, columns) of patches in an image of (height, width) pixels.

    Raises:
        ValueError: if a side is not a positive multiple of the patch.
    """
    height, width = image_size
    if min(height, width) < patch or height % patch or width % patch:
        near = tuple(max(round(side / patch), 1) * patch for side in (height, width))
        raise ValueError(
            f"an image of {height} x {width} pixels does not divide into patches of {patch} x {patch}; "
            f"resize or crop it to multiples of {patch}, e.g. {near[0]} x {near[1]}."
        )
    return height // patch, width // patch


def expected_images(channels: int) -> str:
    """Return in words what images of so many channels are."""
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}[channels]
    return f"[b, H, W, {channels}], a batch of {kind} images"


def check_images(shape: tuple[int, ...], dtype: jnp.dtype, channels: int) -> None:
    """Check that images are a batch of so many channels, floating point.

    Raises:
        ValueError: they are something else.
    """
    if len(shape) != 4 or shape[-1] != channels:
        raise ValueError(f"images have shape {shape}; expected {expected_images(channels)}.")
    if shape[0] < 1:
        raise ValueError(f"images have shape {shape}: an empty batch; expected at least one image.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"images are {dtype}; expected floating point, normalised as in training.")
