"""The parts of a block that do not mix tokens: initialisers, MLP, LayerScale, stochastic depth."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from vir_jax.models.linear import Linear
from vir_jax.models.sharding import constrain

LAYER_NORM_EPSILON = 1e-6

# Standard deviation of a standard normal cut at +-2: `truncated_normal` does not correct for the cut, so
# dividing by it gives weights whose standard deviation is the 0.02 of docs/method.md, section 3.
_STD_OF_TRUNCATED_NORMAL = 0.87962566103423978
linear_init = nnx.initializers.truncated_normal(0.02 / _STD_OF_TRUNCATED_NORMAL, lower=-2.0, upper=2.0)

# The release states an initialisation for its linear layers only. A convolution left untouched there draws
# its kernel from U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the patch embedding gets the same, and a zero bias.
conv_init = nnx.initializers.variance_scaling(1 / 3, mode="fan_in", distribution="uniform")


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute the exact GELU, x Phi(x), in float32 and by erf; the result has x's dtype.

    As PyTorch does. `jax.nn.gelu` takes erfc, which costs more, and in bfloat16 rounds after every operation.
    """
    exact = x.astype(jnp.float32)
    return (0.5 * exact * (1 + jax.lax.erf(math.sqrt(0.5) * exact))).astype(x.dtype)


class MLP(nnx.Module):
    """Two linear layers with the GELU between them."""

    def __init__(self, dim: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.up = Linear(
            dim,
            hidden,
            dtype=dtype,
            kernel_init=linear_init,
            kernel_metadata={"axes": ("embed", "hidden")},
            bias_metadata={"axes": ("hidden",)},
            rngs=rngs,
        )
        self.down = Linear(
            hidden,
            dim,
            dtype=dtype,
            kernel_init=linear_init,
            kernel_metadata={"axes": ("hidden", "embed")},
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Apply the MLP to each token."""
        hidden = checkpoint_name(constrain(self.up(x), "batch", None, "hidden"), "hidden")
        return checkpoint_name(self.down(gelu(hidden)), "mlp")


class LayerScale(nnx.Module):
    """A learned factor per channel on what a residual branch adds (docs/method.md, section 3: init 1e-5)."""

    def __init__(self, dim: int, init: float) -> None:
        self.scale = nnx.Param(jnp.full((dim,), init, jnp.float32))

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Scale each channel; the result is float32."""
        return x * self.scale[...]


def set_norm_epsilon(module: nnx.Module, epsilon: float) -> None:
    """Set what every layer norm within a module adds to the variance."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.LayerNorm):
            part.epsilon = epsilon


def drop_path(
    x: Float[Array, "b n c"], rate: float | Float[Array, ""], key: PRNGKeyArray | None
) -> Float[Array, "b n c"]:
    """Stochastic depth: drop a residual branch for whole samples.

    Args:
        x: what the branch would add, one row per sample.
        rate: probability in [0, 1) that a sample's branch is dropped; kept ones are divided by `1 - rate`, so
            the expectation is `x`.
        key: random key; `None` (evaluation) returns `x`.

    A branch that is not finite stays so when it is dropped.
    """
    if key is None:
        return x
    kept = jnp.asarray(1.0 - rate, jnp.float32)
    factor = jax.random.bernoulli(key, kept, (x.shape[0], 1, 1)) / kept
    return (x * factor).astype(x.dtype)
