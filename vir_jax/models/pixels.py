"""From stored pixels to what a model reads."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt8


def normalize(
    images: UInt8[Array, "b y x colours"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b y x channels"]:
    """Colours from 0..255 to (colour / 255 - mean) / std, in float32.

    With one mean and deviation RGB images become grey first: the average of their colours.

    Raises:
        ValueError: images of another number of colours than there are means.
    """
    mean_, std_ = (jnp.asarray(values, jnp.float32) for values in (mean, std))
    colours, channels = images.shape[-1], len(mean)
    if colours != channels and (colours, channels) != (3, 1):
        raise ValueError(
            f"images have {colours} colours and the normalisation is of {channels}; expected as many, or RGB images"
            " and one mean and deviation, of grey"
        )
    values = images.astype(jnp.float32)
    if colours != channels:
        values = jnp.mean(values, axis=-1, keepdims=True)
    return (values / 255 - mean_) / std_


def to_levels(images: UInt8[Array, "b y x 3"], levels: int, channels: int) -> Int32[Array, "b y x channels"]:
    """Return each colour's nearest of 0 .. levels - 1, which stand for 0 .. 255; of 1 channel that of their average."""
    colours = images.astype(jnp.int32)
    values = jnp.sum(colours, axis=-1, keepdims=True, dtype=jnp.int32) if channels == 1 else colours
    white = 255 * 3 // channels
    return (2 * values * (levels - 1) + white) // (2 * white)


def to_colours(symbols: Int32[Array, "b y x channels"], levels: int) -> UInt8[Array, "b y x 3"]:
    """Return the pixels that levels stand for; `to_levels` gives the levels back."""
    colours = (2 * 255 * symbols + levels - 1) // (2 * (levels - 1))
    return jnp.broadcast_to(colours, (*symbols.shape[:-1], 3)).astype(jnp.uint8)


def cut_patches(images: Shaped[Array, "b H W channels"], patch: int) -> Shaped[Array, "b rows cols pixels"]:
    """Return the numbers of every patch side by side, row by row, as the kernel of a convolution has them."""
    b, height, width, channels = images.shape
    rows, cols = height // patch, width // patch
    cut = images.reshape(b, rows, patch, cols, patch, channels).swapaxes(2, 3)
    return cut.reshape(b, rows, cols, channels * patch**2)


def join_patches(patches: Shaped[Array, "b rows cols pixels"], patch: int) -> Shaped[Array, "b H W channels"]:
    """Return the image of patches whose numbers stand side by side: what `cut_patches` cut."""
    b, rows, cols, pixels = patches.shape
    channels = pixels // patch**2
    joined = patches.reshape(b, rows, cols, patch, patch, channels).swapaxes(2, 3)
    return joined.reshape(b, rows * patch, cols * patch, channels)
