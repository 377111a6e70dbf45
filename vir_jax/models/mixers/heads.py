"""What the mixers with queries, keys and values share: projections around `mix`."""

import abc
import math

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from vir_jax.models.layers import linear_init
from vir_jax.models.layout import Layout
from vir_jax.models.mixers.mixer import Mixer, State
from vir_jax.models.sharding import constrain

Heads = Float[Array, "b n h d"]


class HeadsMixer(Mixer):
    """Projections to q, k and v of every head, `mix`, and a projection of the heads back.

    Parameters: `qkv.kernel [c, 3, h, d]`, `out.kernel [h, d, c]`, and their biases. The head axis is explicit so that
    heads can be split over a mesh axis. Intermediates: "q" (not yet scaled), "k", "v", and "heads", each head's output
    before the output projection; where a mixer has it, "gain", by which that was multiplied.
    """

    intermediate_names: tuple[str, ...] = ("q", "k", "v", "heads")

    def __init__(self, dim: int, heads: int, layout: Layout, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        if dim % heads:
            raise ValueError(
                f"dim={dim} is not divisible by heads={heads}; every head has dim / heads channels."
            )
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.qkv = nnx.LinearGeneral(
            dim,
            (3, heads, self.head_dim),
            dtype=dtype,
            kernel_init=linear_init,
            kernel_metadata={"axes": ("embed", None, "heads", None)},
            bias_metadata={"axes": (None, "heads", None)},
            rngs=rngs,
        )
        self.out = nnx.LinearGeneral(
            (heads, self.head_dim),
            dim,
            axis=(-2, -1),
            dtype=dtype,
            kernel_init=linear_init,
            kernel_metadata={"axes": ("heads", None, "embed")},
            rngs=rngs,
        )

    @abc.abstractmethod
    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """Mix the tokens of each head: outputs, and the state after them (None where not causal)."""

    def mix_of(
        self,
        x: Float[Array, "b n c"],
        q: Heads,
        k: Heads,
        v: Heads,
        layout: Layout,
        *,
        mode: str,
        state: State | None,
    ) -> tuple[Heads, State | None]:
        """Compute `mix`; of a mixer that reads more of the tokens than their q, k and v, from x besides."""
        return self.mix(q, k, v, layout, mode=mode, state=state)

    def gain(self, x: Float[Array, "b n c"], heads: Heads) -> Float32[Array, "b n h #d"] | None:
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
        heads, state = self.mix_of(x, q, k, v, layout, mode=mode, state=state)
        heads = checkpoint_name(heads, "heads")
        found = {"q": q, "k": k, "v": v}
        gain = self.gain(x, heads)
        if gain is not None:
            found["gain"] = jnp.broadcast_to(gain, heads.shape)
            heads = (heads.astype(jnp.float32) * gain).astype(heads.dtype)
        mixed = checkpoint_name(self.out(heads), "mixed")
        return mixed, state if return_state else None, found | {"heads": heads}

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count the projections and `mixing_multiply_adds`."""
        return 4 * layout.length * self.dim**2 + self.mixing_multiply_adds(layout, mode)

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count the multiply-adds of `mix`.

        Raises:
            ValueError: they are not counted in this mode.
        """
        return Mixer.multiply_adds(self, layout, mode)

    def project(self, x: Float[Array, "b n c"]) -> list[Heads]:
        """Compute self.qkv(x) by a product for each of q, k and v, written where the mixer reads it.

        Of one product for all three XLA would copy the parts; of three it copies the parts of the kernel, which is more
        where there are few tokens, as in a row of a stream. And the biases are flat, because XLA for GPUs then adds
        them within the product.
        """
        assert self.qkv.bias is not None
        if math.prod(x.shape[:-1]) < self.dim:
            together = self.qkv(x)
            return [checkpoint_name(together[:, :, i], "qkv") for i in range(3)]
        x, kernel, bias = (y.astype(self.qkv.dtype) for y in (x, self.qkv.kernel[...], self.qkv.bias[...]))
        # Gathered whole, where fsdp splits its rows, and not part by part.
        kernel = constrain(kernel, None, None, "heads", None)
        heads = (*x.shape[:-1], self.heads, self.head_dim)
        products = (
            (x @ kernel[:, i].reshape(self.dim, -1) + bias[i].reshape(-1)).reshape(heads) for i in range(3)
        )
        return [checkpoint_name(constrain(y, "batch", None, "heads", None), "qkv") for y in products]
