"""From an image's pixels to tokens that predict them (docs/method.md, section 10): each sees those before its own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vir_jax.models.layout import Layout
from vir_jax.models.likelihood import Likelihood
from vir_jax.models.linear import Linear
from vir_jax.models.mixers import mixer_names, mixer_type
from vir_jax.models.options import check_option, is_integer
from vir_jax.models.position import POSITIONS


class PixelStem(nnx.Module):
    """A token for each pixel, in raster order: what came before it, and where it stands.

    Token n holds an embedding of pixel n - 1 (of the first one a learned start), of the other earlier pixels within
    `local_context` of pixel n, and the position of pixel n, the one that is to be predicted. There is no class token.
    Of a grey pixel every level has an embedding of its own; of an RGB one it is linear in the values -1 .. 1.

    Parameters: `embedding.kernel [offsets * features, c]`, `start [1, 1, c]`, `position.embedding` (where learned).

    Args:
        image_size: (height, width) that the position embeddings are made for.
        dim: channels of a token.
        likelihood: of a pixel, which says its levels and channels.
        local_context: radius in rows and columns; 0: the pixel before alone.
        position: "learned" or "sincos".
        dtype: of the embedding.
        rngs: of the parameters.
    """

    patch, passes, streams = 1, 1, True

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        dim: int,
        likelihood: Likelihood,
        local_context: int,
        position: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.image_size, self.dim, self.likelihood = image_size, dim, likelihood
        self.offsets = earlier_offsets(local_context)
        normal = nnx.initializers.normal(0.02)
        self.embedding = Linear(
            (1 + len(self.offsets)) * self._features,
            dim,
            use_bias=False,
            dtype=dtype,
            kernel_init=normal,
            kernel_metadata={"axes": (None, "embed")},
            rngs=rngs,
        )
        self.position = POSITIONS[position](image_size, dim, rngs=rngs)
        self.start = nnx.Param(normal(rngs.params(), (1, 1, dim), jnp.float32))

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.likelihood.channels

    @property
    def _features(self) -> int:
        return self.likelihood.levels if self.likelihood.channels == 1 else self.likelihood.channels + 1

    def layout(self, image_size: Sequence[int]) -> Layout:
        """Return where the tokens of an image of (height, width) pixels stand."""
        height, width = image_size
        return Layout(cols=width, patches=height * width, class_token=None)

    def reach(self, width: int) -> int:
        """Return how many pixels before its own a token may see, in an image so wide."""
        return max([1, *(-dy * width - dx for dy, dx in self.offsets)])

    def __call__(
        self, symbols: Int[Array, "b H W channels"]
    ) -> tuple[Float[Array, "b n c"], Layout, dict[str, Array]]:
        """Embed whole images.

        Returns:
            The tokens, float32; their layout; and by name the intermediates: "patch_tokens" `[b, n, c]`, without
            position, and "tokens", the first result.

        Raises:
            ValueError: anything but levels of as many channels as the model has.
        """
        channels = self.likelihood.channels
        if symbols.ndim != 4 or symbols.shape[-1] != channels:
            raise ValueError(
                f"symbols have shape {symbols.shape}; expected [b, H, W, {channels}], levels of a batch of images"
            )
        b, height, width, _ = symbols.shape
        layout = self.layout((height, width))
        none_before = jnp.zeros((b, self.reach(width), channels), symbols.dtype)
        sequence = symbols.reshape(b, -1, channels)[:, :-1]
        content = self._content(jnp.concatenate([none_before, sequence], axis=1), layout)
        tokens = content + self.position.of_grid((height, width)).reshape(1, -1, self.dim)
        return tokens, layout, {"patch_tokens": content, "tokens": tokens}

    def piece(
        self, earlier: Int[Array, "b m channels"], layout: Layout, height: int
    ) -> Float[Array, "b n c"]:
        """Embed the tokens of a piece of images.

        Args:
            earlier: the pixels before the last one of the piece: as many as `reach` before its first one (those before
                the image may be anything), and those between.
            layout: of the piece.
            height: of the images, in pixels.
        """
        position = self.position.lookup(jnp.int32(0), (height, layout.cols), height)
        return self._content(earlier, layout) + position(*layout.positions)

    def multiply_adds(self, layout: Layout) -> int:
        """Count the embedding's multiply-adds of one image."""
        return layout.patches * math.prod(self.embedding.in_features) * self.dim

    def _content(self, earlier: Int[Array, "b m channels"], layout: Layout) -> Float[Array, "b n c"]:
        n, reach = layout.patches, self.reach(layout.cols)
        y, x = layout.positions
        features = self._embeddable(earlier)

        def seen(distance: int, inside: Array) -> Array:
            # A zero is no pixel: every pixel has a feature that is not zero. Nor is one so far to the side in any row.
            if distance < 1:
                return jnp.zeros((features.shape[0], n, features.shape[-1]), features.dtype)
            return jnp.where(inside[:, None], features[:, reach - distance : reach - distance + n], 0)

        is_start = (y == 0) & (x == 0)
        parts = [seen(1, ~is_start)]
        for dy, dx in self.offsets:
            inside = (y + dy >= 0) & (x + dx >= 0) & (x + dx < layout.cols)
            parts.append(seen(-dy * layout.cols - dx, inside))
        embedded = self.embedding(jnp.concatenate(parts, axis=-1)).astype(jnp.float32)
        return embedded + jnp.where(is_start[:, None], self.start[...], 0)

    def _embeddable(self, symbols: Int[Array, "b m channels"]) -> Float[Array, "b m features"]:
        levels = self.likelihood.levels
        if self.likelihood.channels == 1:
            return jax.nn.one_hot(symbols[..., 0], levels, dtype=jnp.float32)
        values = 2 * symbols.astype(jnp.float32) / (levels - 1) - 1
        return jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)


def earlier_offsets(radius: int) -> tuple[tuple[int, int], ...]:
    """Return (rows, columns) from a pixel to the earlier ones within a radius, without the one to the left."""
    above = ((dy, dx) for dy in range(-radius, 0) for dx in range(-radius, radius + 1))
    return (*above, *((0, dx) for dx in range(-radius, -1)))


def check_predicts_pixels(
    patch: int,
    mixer: str,
    *,
    both_ways: Mapping[str, Any],
    readout: str | None,
    local_context: int | None,
) -> None:
    """Check the options of a model whose tokens predict pixels; `both_ways` are those that read it backwards, too.

    Raises:
        ValueError: a token would be more than a pixel, or see what it predicts, or nothing would read it.
    """
    if patch != 1:
        raise ValueError(
            f"stem='pixels' makes a token of every pixel, and the model's name says patches of {patch} x {patch}; "
            "expected a name that ends in 1, such as vir_pico1."
        )
    given = [f"{option}={value!r}" for option, value in both_ways.items() if value]
    given += [] if mixer_type(mixer).causal else [f"mixer={mixer!r}"]
    if given:
        causal = [name for name in mixer_names() if mixer_type(name).causal]
        raise ValueError(
            f"stem='pixels' makes no sense with {given[0]}: a token would see the pixel that it predicts. Read the "
            f"image once, with one of the mixers {causal}."
        )
    check_option(
        "readout", readout, readout in (None, "every_token"), "'every_token' with stem='pixels', or None"
    )
    valid = local_context is None or (is_integer(local_context) and local_context >= 0)
    check_option("local_context", local_context, valid, "a radius of 0 or more pixels, or None")


def check_no_pixel_options(of_pixels: Mapping[str, Any]) -> None:
    """Check that a model of patches was given no option of models of pixels.

    Raises:
        ValueError: it was.
    """
    for option, value in of_pixels.items():
        if value is not None:
            raise ValueError(
                f"{option}={value!r} is of models of pixels. Leave it out, or say stem='pixels'."
            )
