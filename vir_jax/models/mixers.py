"""Token mixers: retention (1-D and 2-D) and the softmax attention it is compared with.

A mixer projects tokens to q, k, v per head, mixes them along the sequence, and projects the heads back. The
three differ in `mix` alone and have the same parameters.
"""

import abc
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vir_jax.models.layers import linear_init
from vir_jax.models.sharding import constrain, on_each_device
from vir_jax.ops import retention, retention_2d, vir_log_decay
from vir_jax.ops.kernels import PLATFORMS as KERNELS

Heads = Float[Array, "b n h d"]
State = Float[Array, "b ..."]
"""What retention has read so far, float32: `[b, h, d, d]` in 1-D, `[b, h, cols, d, d]` in 2-D."""

# Dimensions of heads' tokens, of decays and of a 1-D state; see `on_each_device`.
HEADS, DECAYS, STATE = ("batch", None, "heads", None), ("heads",), ("batch", "heads", None, None)


class Mixer(nnx.Module):
    """Projections around `mix`.

    Parameters: `qkv.kernel [c, 3, h, d]`, `out.kernel [h, d, c]`, and their biases. The head axis is explicit
    so that heads can be sharded over a mesh axis.
    """

    def __init__(self, dim: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        if dim % heads:
            raise ValueError(
                f"dim={dim} is not divisible by heads={heads}; every head has dim / heads channels."
            )
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.qkv = nnx.LinearGeneral(
            dim, (3, heads, self.head_dim), dtype=dtype, kernel_init=linear_init, rngs=rngs
        )
        self.out = nnx.LinearGeneral(
            (heads, self.head_dim), dim, axis=(-2, -1), dtype=dtype, kernel_init=linear_init, rngs=rngs
        )

    @abc.abstractmethod
    def mix(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        *,
        mode: str,
        grid: tuple[int, int],
        initial_state: State | None,
        return_state: bool,
    ) -> tuple[Heads, State | None]:
        """Mix the tokens of each head; see `__call__` for the arguments."""

    def __call__(
        self,
        x: Float[Array, "b n c"],
        *,
        mode: str,
        grid: tuple[int, int],
        initial_state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Array, "b n c"], State | None, dict[str, Heads]]:
        """Mix tokens.

        Args:
            x: tokens.
            mode: form of the operator: "auto", "parallel", "recurrent" or "chunkwise".
            grid: (rows, columns) of patches at the head of the sequence; read by 2-D retention alone.
            initial_state: state left by the tokens before these; `None`: there were none.
            return_state: whether to return the state after these tokens.

        Returns:
            The mixed tokens, the state (`None` unless asked for), and by name what was computed on the way:
            "q" (not yet scaled), "k", "v", and "heads", each head's output before the output projection.
        """
        q, k, v = self._project(x)
        heads, state = self.mix(
            q, k, v, mode=mode, grid=grid, initial_state=initial_state, return_state=return_state
        )
        heads = checkpoint_name(heads, "heads")
        mixed = checkpoint_name(self.out(heads), "mixed")
        return mixed, state, {"q": q, "k": k, "v": v, "heads": heads}

    def _project(self, x: Float[Array, "b n c"]) -> list[Heads]:
        """self.qkv(x), by a product for each of q, k and v, written where the mixer reads it.

        Of one product for all three XLA would copy the parts. And the biases are flat, because XLA for GPUs then adds
        them within the product.
        """
        assert self.qkv.bias is not None
        x, kernel, bias = (y.astype(self.qkv.dtype) for y in (x, self.qkv.kernel[...], self.qkv.bias[...]))
        # Gathered whole, where fsdp splits its rows, and not part by part.
        kernel = constrain(kernel, None, None, "heads", None)
        heads = (*x.shape[:-1], self.heads, self.head_dim)
        products = (
            (x @ kernel[:, i].reshape(self.dim, -1) + bias[i].reshape(-1)).reshape(heads) for i in range(3)
        )
        return [checkpoint_name(constrain(y, "batch", None, "heads", None), "qkv") for y in products]


class Retention(Mixer):
    """Retention along the raster order of the tokens (PAPER.md section 1), with ViR's fixed decays."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(dim, heads, dtype=dtype, rngs=rngs)
        self.chunk_size, self.implementation = chunk_size, implementation

    def mix(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        *,
        mode: str,
        grid: tuple[int, int],
        initial_state: State | None,
        return_state: bool,
    ) -> tuple[Heads, State | None]:
        """O = (Q K^T .* D) V, or one of its equal forms."""
        chunk_size = self.chunk_size if mode in ("chunkwise", "auto") else None
        operator: Callable[..., Any] = partial(
            _retention, mode=mode, chunk_size=chunk_size, implementation=self.implementation
        )
        if self.implementation in KERNELS:
            operator = on_each_device(operator, (HEADS, HEADS, HEADS, DECAYS, STATE), (HEADS, STATE))
        heads, state = operator(q, k, v, vir_log_decay(self.heads), initial_state)
        return heads, state if return_state else None


class Retention2D(Mixer):
    """Retention whose decay counts rows and columns (PAPER.md section 2), with ViR's fixed decays."""

    def mix(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        *,
        mode: str,
        grid: tuple[int, int],
        initial_state: State | None,
        return_state: bool,
    ) -> tuple[Heads, State | None]:
        """As in 1-D, with the mask of the grid's patches and the class token below them."""
        log_decay = vir_log_decay(self.heads)
        heads, state = retention_2d(q, k, v, log_decay, grid=grid, mode=mode, initial_state=initial_state)
        return heads, state if return_state else None


class SoftmaxAttention(Mixer):
    """Scaled dot-product attention of every token to every other: ViT's mixer. The softmax is in float32."""

    def mix(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        *,
        mode: str,
        grid: tuple[int, int],
        initial_state: State | None,
        return_state: bool,
    ) -> tuple[Heads, State | None]:
        """softmax(Q K^T / sqrt(d)) V.

        Raises:
            ValueError: for a mode other than "auto" and "parallel", or a state: attention has neither.
        """
        if mode not in ("auto", "parallel"):
            raise ValueError(
                f"softmax attention has no {mode!r} mode; expected 'auto' or 'parallel'. Use a vir_* model: "
                "retention alone can be computed recurrently or chunkwise."
            )
        if initial_state is not None or return_state:
            raise ValueError(
                "softmax attention has no state that summarises earlier tokens; give it the whole sequence."
            )
        return jax.nn.dot_product_attention(q, k, v), None


def _retention(
    q: Heads, k: Heads, v: Heads, log_decay: Array, state: State | None, **options: Any
) -> tuple[Heads, State]:
    """Compute retention of arrays given by place, as `on_each_device` gives them."""
    return retention(q, k, v, log_decay, initial_state=state, **options)
