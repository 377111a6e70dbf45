"""Attention by way of a few landmarks: Nyströmformer (arXiv 2102.03902), as in Vision X-formers (arXiv 2107.02239)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads, HeadsMixer
from vir_jax.models.mixers.mixer import State, register
from vir_jax.models.options import check_positive

TAPS = 33
"""Tokens that the convolution of the values sees: 16 before and 16 after each."""


@register("nystromformer")
class Nystromformer(HeadsMixer):
    """softmax(Q K~^T) softmax(Q~ K~^T)^+ softmax(Q~ K^T) V + conv(V); scores divided by d^(1/2).

    Landmarks Q~ and K~ are the means of equal segments of tokens. Zero tokens are put before the first where the
    segments would not be equal, as published: they are no part of what is returned, but take part in the segments that
    they lie in (the class token stands first, in the first segment that holds a token), and in the softmax over keys,
    with scores of 0. The pseudo-inverse is iterated a few times, not computed exactly: the matrix is nearly singular,
    and few iterations regularise it. Softmax and inverse are in float32.

    The convolution runs over the tokens, with one filter for each head, `local_kernel [h, 33]`.

    Args:
        dim: channels.
        heads: of dim / heads channels each.
        layout: of the image size that the model is made for.
        landmarks: of them; of images with fewer tokens, as many as tokens.
        pinv_iterations: of the pseudo-inverse.
        qkv_bias: whether the projections to q, k and v have biases.
        dtype: of the computation.
        rngs: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layout: Layout,
        *,
        landmarks: int = 64,
        pinv_iterations: int = 6,
        qkv_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        check_positive("landmarks", landmarks)
        check_positive("pinv_iterations", pinv_iterations)
        super().__init__(dim, heads, layout, qkv_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.landmarks, self.pinv_iterations = landmarks, pinv_iterations
        kernel = jax.random.uniform(rngs.params(), (heads, TAPS), jnp.float32, -1.0, 1.0) * TAPS**-0.5
        self.local_kernel = nnx.Param(kernel, axes=("heads", None))

    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """Attend by way of the landmarks, and add the convolution of the values."""
        out = nystrom_attention(q, k, v, landmarks=self.landmarks, iterations=self.pinv_iterations)
        return (out + token_convolution(v, self.local_kernel[...])).astype(v.dtype), None

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count the products between tokens and landmarks, of which there are five, the inverse and the convolution."""
        self.check_call(mode, None, False)
        m, c = min(self.landmarks, layout.length), self.dim
        n = layout.length + -layout.length % m
        inverse = 4 * self.pinv_iterations * self.heads * m**3
        return 4 * n * m * c + m * m * c + n * m * m * self.heads + inverse + TAPS * n * c


def nystrom_attention(
    q: Heads, k: Heads, v: Heads, *, landmarks: int, iterations: int
) -> Float32[Array, "b n h d"]:
    """Compute softmax attention by way of landmarks; see `Nystromformer`."""
    n, m = q.shape[1], min(landmarks, q.shape[1])
    padding = ((0, 0), (-n % m, 0), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x.astype(jnp.float32), padding) for x in (q, k, v))
    q *= q.shape[-1] ** -0.5
    q_mean, k_mean = (jnp.mean(x.reshape(x.shape[0], m, -1, *x.shape[2:]), axis=2) for x in (q, k))

    def attention(queries: Array, keys: Array) -> Array:
        return jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", queries, keys), axis=-1)

    inverse = pseudo_inverse(attention(q_mean, k_mean), iterations)
    to_landmarks = attention(q[:, -n:], k_mean) @ inverse
    of_landmarks = jnp.einsum("bhmn,bnhd->bmhd", attention(q_mean, k), v)
    return jnp.einsum("bhnm,bmhd->bnhd", to_landmarks, of_landmarks)


def pseudo_inverse(a: Float[Array, "*b m m"], iterations: int) -> Float[Array, "*b m m"]:
    """Iterate Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Z = A^T / (|A|_1 |A|_inf), for each matrix."""
    rows, columns = (jnp.max(jnp.sum(jnp.abs(a), axis=axis), axis=-1) for axis in (-1, -2))
    z = jnp.swapaxes(a, -1, -2) / (rows * columns)[..., None, None]
    one = jnp.eye(a.shape[-1], dtype=a.dtype)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


def token_convolution(x: Heads, kernel: Float32[Array, "h t"]) -> Float32[Array, "b n h d"]:
    """Correlate the tokens of each head with its filter, zeros standing before the first token and after the last.

    Blocks of tokens times a banded matrix: linear in the tokens, and CPUs, which are slow at convolutions of single
    channels and slower at sums over shifted tokens, have the gradients by products, too.
    """
    n, taps = x.shape[1], kernel.shape[1]
    block, half = 2 * taps, taps // 2
    blocks = -(-n // block)

    tap = jnp.arange(block + taps - 1) - jnp.arange(block)[:, None]
    band = jnp.where((tap >= 0) & (tap < taps), kernel[:, jnp.clip(tap, 0, taps - 1)], 0.0)

    after = (blocks + 1) * block - half - n
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (half, after), (0, 0), (0, 0)))
    tiles = padded.reshape(x.shape[0], blocks + 1, block, *x.shape[2:])
    windows = jnp.concatenate([tiles[:, :-1], tiles[:, 1:, : taps - 1]], axis=2)
    out = jnp.einsum("hij,bcjhd->bcihd", band, windows)
    return out.reshape(x.shape[0], blocks * block, *x.shape[2:])[:, :n]
