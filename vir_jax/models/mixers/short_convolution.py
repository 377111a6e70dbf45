"""A short causal convolution over tokens, whose state is the last few of them."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from vir_jax.models.layers import conv_init


class ShortConvolution(nnx.Module):
    """x_n + sum_i w_i x_{n-i} for i = 0 .. width - 1, each channel by itself; before the first token there are zeros.

    Tokens count in the order in which they are read: in raster order the window runs over the end of a row, and a class
    token that comes last sees the last patches. Parameters: `kernel [width, c]`, `kernel[i]` being w_i.
    """

    def __init__(self, width: int, dim: int, *, rngs: nnx.Rngs) -> None:
        self.width = width
        # As of a convolution of one channel each, whose fan-in is the window.
        kernel = conv_init(rngs.params(), (width, 1, dim), jnp.float32)
        self.kernel = nnx.Param(kernel[:, 0], axes=(None, "embed"))

    def __call__(
        self, x: Float[Array, "b n c"], recent: Float32[Array, "b w c"] | None
    ) -> tuple[Float[Array, "b n c"], Float32[Array, "b w c"]]:
        """Convolve the next tokens.

        Args:
            x: the tokens.
            recent: the w = width - 1 tokens before them; None: there were none.

        Returns:
            What becomes of them, and the last width - 1 tokens.
        """
        n = x.shape[1]
        if recent is None:
            recent = self.initial_state(x.shape[0])
        tokens = jnp.concatenate([recent, x.astype(jnp.float32)], axis=1)
        kernel, last = self.kernel[...], self.width - 1
        mixed = sum(kernel[i] * tokens[:, last - i : last - i + n] for i in range(self.width))
        return (x + mixed).astype(x.dtype), tokens[:, n:]

    def initial_state(self, batch: int) -> Float32[Array, "b w c"]:
        """Return the tokens before the first: zeros."""
        return jnp.zeros((batch, self.width - 1, self.kernel.shape[-1]), jnp.float32)

    def multiply_adds(self, tokens: int) -> int:
        """Count a product for every token, channel and place of the window."""
        return tokens * self.width * self.kernel.shape[-1]
