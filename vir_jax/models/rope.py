"""Rotary positions (RoPE, arXiv 2104.09864): queries and keys turned by angles that grow with a token's position."""

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from vir_jax.models.layout import Layout

Rope = Literal["1d", "2d"]
"""By the token's index in the sequence, or half of the channels by its row and half by its column."""


def rotate(x: Float[Array, "b n h d"], angles: Float32[Array, "n i"]) -> Float[Array, "b n h d"]:
    """Turn the pairs of channels (2 i, 2 i + 1) by the angles: (a cos - b sin, b cos + a sin).

    Norms stay, and a product of two turned vectors depends on the difference of their angles alone. In float32.
    """
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def token_angles(layout: Layout, rope: Rope, dim: int) -> Float32[Array, "n i"]:
    """Return the angles of every token, for heads of `dim` channels; see `check_rope`."""
    if rope == "1d":
        return angles_at(layout.order, dim)
    return jnp.concatenate([angles_at(line, dim // 2) for line in layout.places], axis=-1)


def angles_at(position: Int[Array, " n"], dim: int) -> Float32[Array, "n i"]:
    """Compute position * 10000^(-2 i / dim) for i = 0 .. dim / 2 - 1, but for whole turns.

    As exactly far down a stream as at its start: positions are multiplied by the frequency as a fraction of 2^32 of a
    turn, in integers that wrap as angles do. In float32 the angle itself would be wrong by 0.06 at a million.
    """
    radians = 10_000.0 ** (-2 * np.arange(dim // 2) / dim)
    frequency = jnp.asarray(np.rint(radians / (2 * math.pi) * 2**32).astype(np.uint32))
    phase = position.astype(jnp.uint32)[:, None] * frequency
    return phase.astype(jnp.float32) * jnp.float32(2 * math.pi / 2**32)


def check_rope(rope: Rope, dim: int) -> None:
    """Check that heads of `dim` channels have pairs to turn.

    Raises:
        ValueError: they have not.
    """
    position, divisor = {"1d": ("rope", 2), "2d": ("rope_2d", 4)}[rope]
    if dim % divisor:
        raise ValueError(
            f"position={position!r} turns pairs of channels: expected heads of a multiple of {divisor} channels, got "
            f"{dim}"
        )
