"""What a model remembers of an image that it reads piece by piece."""

from typing import NamedTuple

from jaxtyping import Array, Float32, Int

from vir_jax.models.embedding import Above
from vir_jax.models.mixers import State


class StreamState(NamedTuple):
    """All that is remembered of the patches read so far."""

    layers: tuple[State, ...]
    """Of each block with a mixer, its state."""
    patches: Int[Array, ""]
    """How many there were; of a pyramid tokens of the last stage."""
    sum: Float32[Array, "b c"]
    """Of the last block's tokens, where the head reads their average; else zero."""
    above: Above
    """Of convolutions, what they remember of the rows above."""
    logits: Float32[Array, "b 1 cols classes"] | None = None
    """Of the last row of patches, where pixels are interpolated between it and the one below."""
