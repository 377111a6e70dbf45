"""Fourier transforms instead of attention: FNet (arXiv 2105.03824), as in Vision X-formers (arXiv 2107.02239)."""

import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.mixer import Mixer, State, register


@register("fnet")
class FNet(Mixer):
    """The real part of a Fourier transform over tokens and channels: no parameter, no heads, every token sees all.

    Unnormalised, as published: the output's standard deviation is about sqrt(n c / 2) times the input's. Computed in
    float32 whatever the dtype, since its sums run over all tokens and channels.
    """

    def __init__(self, dim: int, heads: int, layout: Layout, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dim = dim

    def __call__(
        self,
        x: Float[Array, "b n c"],
        layout: Layout,
        *,
        mode: str = "auto",
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Array, "b n c"], None, dict[str, Array]]:
        """Y = Re(F_tokens F_channels X)."""
        self.check_call(mode, state, return_state)
        return jnp.fft.fft2(x.astype(jnp.float32), axes=(1, 2)).real, None, {}

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count half the 5 N log2 N operations of a fast Fourier transform of N = n c numbers."""
        self.check_call(mode, None, False)
        size = layout.length * self.dim
        return round(2.5 * size * math.log2(size))
