"""Linear attention by random features that are positive: Performer (FAVOR+, arXiv 2009.14794)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, PRNGKeyArray

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads, HeadsMixer
from vir_jax.models.mixers.mixer import State, register
from vir_jax.models.options import check_option, check_positive
from vir_jax.models.variables import Constant

EPSILON = 1e-4
"""What is added to every feature: so that no token's sum of weights is 0."""

SEEDS = 2**20
"""Of draws of W: float32 holds these integers, and averages of them to a fraction."""

Features = Float32[Array, "b n h r"]


@register("performer")
class Performer(HeadsMixer):
    """phi(Q) (phi(K)^T V), divided by phi(Q) (phi(K)^T 1): softmax attention in the mean over draws of the features.

    phi(x) = exp(W x - |x|^2 / 2) of scaled x, the rows w of W being random: the mean of phi(q) phi(k) over them is
    exp(q k). W is drawn from the seed of the parameters, and is none of them; all heads share it. Another draw is
    another approximation of the same attention. In float32 whatever the dtype is, as sums run over all tokens.

    W is drawn once, as in Vision X-formers, and is `projection [r, d]`; or anew every `redraw_interval` forward passes
    of training, as in the Performer's own code, so that the parameters suit no draw in particular. What is kept then
    is how many passes there were, among the batch statistics, in checkpoints and averages: W follows from it.

    Args:
        dim: channels.
        heads: of dim / heads channels each.
        layout: of the image size that the model is made for.
        features: rows of W. None: d log d, of heads of d channels.
        redraw_interval: forward passes of training from one draw of W to the next, steps where gradients are not
            accumulated; None: W is drawn once.
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
        features: int | None = None,
        redraw_interval: int | None = None,
        qkv_bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(dim, heads, layout, qkv_bias=qkv_bias, dtype=dtype, rngs=rngs)
        if features is None:
            check_option("heads", heads, self.head_dim > 1, "heads of at least 2 channels each")
            features = int(self.head_dim * math.log(self.head_dim))
        check_positive("features", features)
        self.features, self.redraw_interval = features, redraw_interval
        self.deterministic = True  # `train` and `eval` of the module set it.
        if redraw_interval is None:
            self.projection = Constant(orthogonal_projection(rngs.params(), features, self.head_dim))
        else:
            check_positive("redraw_interval", redraw_interval)
            seed = jax.random.randint(rngs.params(), (), 0, SEEDS, jnp.int32)
            self.seed = Constant(seed.astype(jnp.float32))
            self.passes = nnx.BatchStat(jnp.zeros((), jnp.float32))

    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """Attend to all tokens by one sum over them."""
        projection = self.draw()
        return linear_attention(query_features(q, projection), key_features(k, projection), v), None

    def draw(self) -> Float32[Array, "r d"]:
        """Return W, counting the pass where W is drawn anew and the model is in training."""
        if self.redraw_interval is None:
            return jax.lax.stop_gradient(self.projection[...])
        passes = self.passes[...]
        if not self.deterministic:
            self.passes[...] = passes + 1
        # Numbers are float32, as all that is averaged over steps is; an average of one number may have been rounded.
        seed = jax.random.key(jnp.round(self.seed[...]).astype(jnp.int32))
        drawn = jax.random.fold_in(seed, (passes // self.redraw_interval).astype(jnp.int32))
        return jax.lax.stop_gradient(orthogonal_projection(drawn, self.features, self.head_dim))

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count features of q and k, and the products with keys and queries: n r c each."""
        self.check_call(mode, None, False)
        return 4 * layout.length * self.features * self.dim


def linear_attention(queries: Features, keys: Features, v: Heads) -> Heads:
    """Compute phi(Q) (phi(K)^T V) / (phi(Q) (phi(K)^T 1)): means of the values, by weights that are never formed."""
    sums = jnp.einsum("bnhr,bnhe->bhre", keys, v.astype(jnp.float32))
    weight = jnp.einsum("bnhr,bhr->bnh", queries, jnp.sum(keys, axis=1))
    return (jnp.einsum("bnhr,bhre->bnhe", queries, sums) / weight[..., None]).astype(v.dtype)


def orthogonal_projection(key: PRNGKeyArray, features: int, dim: int) -> Float32[Array, "r d"]:
    """Draw the rows of W: orthogonal within blocks of `dim`, with the lengths of normal vectors of `dim` numbers.

    Each direction is as likely as any other, without which the features would be biased. Q of a QR decomposition alone
    is not: Householder's reflections make the first number of the first row negative always, and so on; the signs of
    R's diagonal undo it. (The published code does without.)
    """
    blocks = -(-features // dim)
    of_blocks, of_norms = jax.random.split(key)
    gaussian = jax.random.normal(of_blocks, (blocks, dim, dim), jnp.float32)
    q, r = jnp.linalg.qr(gaussian)
    q *= jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]
    rows = jnp.swapaxes(q, 1, 2).reshape(-1, dim)[:features]
    lengths = jnp.linalg.norm(jax.random.normal(of_norms, (features, dim), jnp.float32), axis=1)
    return lengths[:, None] * rows


def query_features(q: Heads, projection: Float32[Array, "r d"]) -> Features:
    """Compute phi(q), each token's divided by its own largest exp(W q), a factor that cancels."""
    products, norms = exponents(q, projection)
    return positive(products - norms - largest(products, axis=3))


def key_features(k: Heads, projection: Float32[Array, "r d"]) -> Features:
    """Compute phi(k), divided by the largest exp(W k) of a head's tokens, a factor that cancels.

    Of each example by itself: the published Vision X-formers take it over the whole batch, whose examples then meet.
    """
    products, norms = exponents(k, projection)
    return positive(products - norms - largest(products, axis=(1, 3)))


def exponents(x: Heads, projection: Float32[Array, "r d"]) -> tuple[Features, Float32[Array, "b n h 1"]]:
    """Compute W x and |x|^2 / 2 of x / d^(1/4): q k is then that of attention, divided by d^(1/2)."""
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    return jnp.einsum("bnhd,rd->bnhr", x, projection), jnp.sum(x * x, axis=-1, keepdims=True) / 2


def positive(exponent: Features) -> Features:
    """Compute (exp(exponent) + EPSILON) / sqrt(r)."""
    return exponent.shape[-1] ** -0.5 * (jnp.exp(exponent) + EPSILON)


def largest(x: Features, axis: int | tuple[int, ...]) -> Float32[Array, "b _ h 1"]:
    """Return the largest along axes, through which no gradient flows."""
    return jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
