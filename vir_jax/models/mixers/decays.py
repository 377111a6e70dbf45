"""Where retention's decays come from: fixed, learned by each head, or computed of each token.

A decay is the log(gamma) of a head, float32, or that of a head and token; see `vir_jax.ops.retention`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from vir_jax.models.layers import linear_init
from vir_jax.ops import retnet_log_decay, vir_log_decay


def no_log_decay(num_heads: int) -> Float32[Array, " h"]:
    """Return log(gamma) = 0: nothing is forgotten, and retention is linear attention without a norm."""
    return jnp.zeros(num_heads, jnp.float32)


FIXED: dict[str, Callable[[int], Float32[Array, " h"]]] = {
    "vir": vir_log_decay,
    "retnet": retnet_log_decay,
    "none": no_log_decay,
}


class FixedDecay(nnx.Module):
    """Decays of `FIXED`, by name: no parameter."""

    def __init__(self, name: str, heads: int) -> None:
        self.name, self.heads = name, heads

    def __call__(self, x: Float[Array, "b n c"]) -> Float32[Array, " h"]:
        """Return the decay of each head, whatever the tokens are."""
        return self.of_heads()

    def of_heads(self) -> Float32[Array, " h"]:
        """Return the decay of each head."""
        return FIXED[self.name](self.heads)


class LearnedDecay(nnx.Module):
    """A decay gamma = sigmoid(logit) for each head, which starts as ViR's.

    About exp(logit) tokens are remembered, so that a step of the optimiser changes how long by a share.
    """

    def __init__(self, heads: int) -> None:
        self.logit = nnx.Param(vir_decay_logit(heads), axes=("heads",))

    def __call__(self, x: Float[Array, "b n c"]) -> Float32[Array, " h"]:
        """Return the decay of each head, whatever the tokens are."""
        return self.of_heads()

    def of_heads(self) -> Float32[Array, "*l h"]:
        """Return the decay of each head; of stacked layers, those of each."""
        return jax.nn.log_sigmoid(self.logit[...])


class TokenDecay(nnx.Module):
    """A decay gamma = sigmoid(x_n . w + bias) for each head and token; near ViR's at first, by the bias."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.logit = nnx.Linear(
            dim,
            heads,
            dtype=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=linear_init,
            bias_init=lambda key, shape, dtype: vir_decay_logit(heads),
            kernel_metadata={"axes": ("embed", "heads")},
            bias_metadata={"axes": ("heads",)},
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b n c"]) -> Float32[Array, "b n h"]:
        """Compute the decay of every head at each token."""
        return jax.nn.log_sigmoid(self.logit(x))

    def of_heads(self) -> Float32[Array, " h"]:
        """Raise: there are none.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "with decays='token' no head has a decay of its own: each token has another one. Use a model with other "
            "decays"
        )


Decay = FixedDecay | LearnedDecay | TokenDecay
DECAYS = (*FIXED, "learned", "token")


def make_decay(name: str, dim: int, heads: int, *, rngs: nnx.Rngs) -> Decay:
    """Return the decays of that name, one of `DECAYS`."""
    if name == "learned":
        return LearnedDecay(heads)
    return TokenDecay(dim, heads, rngs=rngs) if name == "token" else FixedDecay(name, heads)


def vir_decay_logit(num_heads: int) -> Float32[Array, " h"]:
    """Compute log(gamma / (1 - gamma)) of ViR's decays."""
    log_decay = vir_log_decay(num_heads)
    return log_decay - jnp.log(-jnp.expm1(log_decay))
