"""What the mixers with queries, keys and values share: projections around `mix`."""

import abc
import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from vir_jax.models.layers import linear_init
from vir_jax.models.layout import Layout
from vir_jax.models.linear import Linear, add_bias, product
from vir_jax.models.mixers.mixer import Mixer, State
from vir_jax.models.options import check_bool
from vir_jax.models.rope import Rope, check_rope, rotate, token_angles
from vir_jax.models.sharding import constrain

Heads = Float[Array, "b n h d"]
KeyHeads = Float[Array, "b n g d"]
"""Of g heads, as many as those of the queries, or one for all of them."""


class HeadsMixer(Mixer):
    """Projections to q, k and v of every head, `mix`, and a projection of the heads back.

    Parameters: `qkv.kernel [c, 3, h, d]`, `out.kernel [h, d, c]`, and their biases. The head axis is explicit so that
    heads can be split over a mesh axis. Intermediates: "q" (not yet scaled) and "k", turned where positions are rotary,
    "v", and "head_outputs", those of each head before the output projection; where a mixer has it, "gain", by which
    they were multiplied.
    """

    intermediate_names: tuple[str, ...] = ("q", "k", "v", "head_outputs")
    rope: Rope | None = None

    def __init__(
        self,
        dim: int,
        heads: int,
        layout: Layout,
        *,
        qkv_bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        check_bool("qkv_bias", qkv_bias)
        self.dim, self.heads, self.head_dim = dim, heads, head_width(dim, heads)
        self.qkv = to_heads(dim, (3, heads, self.head_dim), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.out = from_heads((heads, self.head_dim), dim, dtype=dtype, rngs=rngs)

    @abc.abstractmethod
    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """Mix the tokens of each head: outputs, and the state after them (None where not causal)."""

    def mix_of(
        self,
        x: Float[Array, "b n c"],
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        layout: Layout,
        *,
        mode: str,
        state: State | None,
    ) -> tuple[Heads, State | None]:
        """Compute `mix`; of a mixer that reads more of the tokens than their q, k and v, from x besides."""
        return self.mix(q, k, v, layout, mode=mode, state=state)

    def gain(self, x: Float[Array, "b n c"], outputs: Heads) -> Float32[Array, "b n h #d"] | None:
        """Return what the output of `mix` is multiplied by before it is projected; None: nothing."""
        return None

    def __call__(
        self,
        x: Float[Array, "b n c"],
        layout: Layout,
        *,
        mode: str = "auto",
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Array, "b n c"], State | None, dict[str, Heads]]:
        """Project, mix and project back; see `Mixer.__call__`."""
        self.check_call(mode, state, return_state)
        q, k, v = self.project(x)
        if self.rope is not None:
            angles = token_angles(layout, self.rope, self.head_dim)
            q, k = rotate(q, angles), rotate(k, angles)
        outputs, state = self.mix_of(x, q, k, v, layout, mode=mode, state=state)
        outputs = checkpoint_name(outputs, "head_outputs")
        found = {"q": q, "k": k, "v": v}
        gain = self.gain(x, outputs)
        if gain is not None:
            found["gain"] = jnp.broadcast_to(gain, outputs.shape)
            outputs = (outputs.astype(jnp.float32) * gain).astype(outputs.dtype)
        mixed = checkpoint_name(self.out(outputs), "mixed")
        return mixed, state if return_state else None, found | {"head_outputs": outputs}

    def use_rope(self, rope: Rope) -> None:
        """Turn q and k of every head, before they are mixed."""
        check_rope(rope, self.head_dim)
        self.rope = rope

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count the projections and `mixing_multiply_adds`."""
        return 4 * layout.length * self.dim**2 + self.mixing_multiply_adds(layout, mode)

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count the multiply-adds of `mix`.

        Raises:
            ValueError: they are not counted in this mode.
        """
        return Mixer.multiply_adds(self, layout, mode)

    def project(self, x: Float[Array, "b n c"]) -> Sequence[Heads]:
        """Compute q, k and v, self.qkv(x), by a product for each of q, k and v, written where the mixer reads it.

        Of one product for all three XLA would copy the parts; of three it copies the parts of the kernel, which is more
        where there are few tokens, as in a row of a stream. And the biases are flat, because XLA for GPUs then adds
        them within the product.
        """
        tokens = math.prod(x.shape[:-1])
        if isinstance(tokens, int) and tokens < self.dim:  # Not known in a program for batches of any size.
            together = self.qkv(x)
            return [checkpoint_name(together[:, :, i], "qkv") for i in range(3)]
        x, kernel = (y.astype(self.qkv.dtype) for y in (x, self.qkv.kernel[...]))
        # Gathered whole, where fsdp splits its rows, and not part by part.
        kernel = constrain(kernel, None, None, "heads", None)
        shape = (*x.shape[:-1], self.heads, self.head_dim)
        products = (product(x, kernel[:, i].reshape(self.dim, -1)) for i in range(3))
        if self.qkv.bias is not None:
            products = (add_bias(y, self.qkv.bias[i].reshape(-1)) for i, y in enumerate(products))
        split = (constrain(y.reshape(shape), "batch", None, "heads", None) for y in products)
        return [checkpoint_name(y, "qkv") for y in split]


def head_width(dim: int, heads: int) -> int:
    """Return the channels of each head.

    Raises:
        ValueError: the heads do not divide the channels.
    """
    if dim % heads:
        raise ValueError(f"dim={dim} is not divisible by heads={heads}; every head has dim / heads channels.")
    return dim // heads


def to_heads(dim: int, shape: tuple[int, ...], *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
    """Make a projection of tokens to `shape`, which ends in heads and their channels."""
    axes = (*(None for _ in shape[:-2]), "heads" if shape[-2] > 1 else None, None)
    return Linear(
        dim,
        shape,
        use_bias=bias,
        dtype=dtype,
        kernel_init=linear_init,
        kernel_metadata={"axes": ("embed", *axes)},
        bias_metadata={"axes": axes},
        rngs=rngs,
    )


def from_heads(shape: tuple[int, int], dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
    """Make a projection of (heads, channels of each) back to tokens."""
    return Linear(
        shape,
        dim,
        axis=(-2, -1),
        dtype=dtype,
        kernel_init=linear_init,
        kernel_metadata={"axes": ("heads", None, "embed")},
        rngs=rngs,
    )
