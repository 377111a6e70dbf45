"""Batch normalisation whose statistics are kept, and what is left of it once they no longer change."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

MOMENTUM = 0.9
"""Of the running statistics: 0.9 of what they were, 0.1 of the batch's (PyTorch says 0.1 for it)."""

EPSILON = 1e-5
"""What is added to the variance where nothing else is said."""


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation over all axes but the last, in float32 whatever the inputs are.

    Under `jax.jit` over a global batch mean and variance are those of the whole batch, on any mesh. The running
    variance is of the biased estimate; PyTorch's is of the unbiased one.

    Parameters: `scale [c]`, `bias [c]`; statistics: `mean [c]`, `var [c]`. A call updates these where `model.train()`
    was said, and else normalises by them.
    """

    def __init__(self, channels: int, *, epsilon: float = EPSILON, rngs: nnx.Rngs) -> None:
        super().__init__(channels, momentum=MOMENTUM, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)

    def affine(self) -> tuple[Float32[Array, "*l c"], Float32[Array, "*l c"]]:
        """Return (factor, summand) of each channel, which evaluation comes to; of stacked layers, those of each."""
        assert self.scale is not None
        assert self.bias is not None
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
        return factor, self.bias[...] - factor * self.mean[...]


class Affine(nnx.Module):
    """A factor and a summand for each channel: a `BatchNorm` in evaluation, by parameters alone."""

    def __init__(self, norm: BatchNorm) -> None:
        factor, summand = norm.affine()
        self.scale, self.bias = nnx.Param(factor), nnx.Param(summand)

    def __call__(self, x: Float[Array, "*b c"]) -> Float32[Array, "*b c"]:
        """Scale and shift each channel."""
        return x.astype(jnp.float32) * self.scale[...] + self.bias[...]
