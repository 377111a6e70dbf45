"""Softmax attention that stores no scores: blocks of queries by blocks of keys, with a running maximum.

For a block of queries, over one block of keys after the other, with scores s = d^-1/2 q k^T of one of them, m the
running maximum of a query's scores, l the sum of exp(s - m) and o that of exp(s - m) v,

    m' = max(m, max s),    l' = exp(m - m') l + sum exp(s - m'),    o' = exp(m - m') o + exp(s - m') v,

and o / l is the output in the end (FlashAttention, arXiv 2205.14135). What is kept for the gradient is log(l) + m of
each query, from which the masses p = exp(s - m) / l of each pair of blocks are computed anew:

    dv = p^T do,    ds = p (do v^T - sum_e do o),    dq = d^-1/2 ds k,    dk = d^-1/2 ds^T q.

Causal attention, of every token to those before and itself, computes no pair of blocks of which all keys are later than
all queries: of t blocks t (t + 1) / 2 pairs are left.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from vir_jax.ops.contract import contract, matmul_precision
from vir_jax.ops.platform import platform
from vir_jax.ops.storage import from_bits, to_bits

# Tokens in a block, at most: the fastest of 64, 128, 256 and 512 queries by 128, 256, 512 and all keys, at 577 to 2,049
# tokens and 6 heads of 64 on a CPU.
BLOCK = 256
# In fp32 on a CPU, the plain form's time over that of the blockwise one, forward / with gradients: 2.0 / 1.6 at 197
# tokens (batch 8), 1.8 / 1.7 at 577, 2.3 / 2.0 at 1,025, 3.5 forward at 2,049.
BLOCKWISE_FROM = 128

Tokens = Float[Array, "b n h d"]
Blocks = Float[Array, "t b h m d"]
Running = tuple[Float32[Array, "b h m 1"], Float32[Array, "b h m 1"], Float32[Array, "b h m d"]]
"""m, l and o."""


class _Kept(NamedTuple):
    """What the gradient is computed from."""

    q: Tokens
    k: Tokens
    v: Tokens
    out: Tokens
    log_sum: Float32[Array, "b n h 1"]


def attention(q: Tokens, k: Tokens, v: Tokens, *, causal: bool = False) -> Tokens:
    """Compute softmax(Q K^T / sqrt(d)) V of each head, by the form that is the faster one where this is compiled for.

    On a CPU that is `blockwise_attention` from BLOCKWISE_FROM tokens on, on an NVIDIA GPU cuDNN's flash attention for
    what it takes where it is not causal, and else XLA's form, which stores all scores. All are one function, in values
    and gradients. Arguments and result are those of `blockwise_attention`.
    """
    if platform() == "cpu" and q.shape[1] >= BLOCKWISE_FROM:
        return blockwise_attention(q, k, v, causal)
    if not causal and _cudnn_takes(v):  # Causal, it has not been tried on a GPU.
        return _cudnn_attention(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def _cudnn_takes(v: Tokens) -> bool:
    """Return whether cuDNN computes attention of such tokens.

    Where a program is compiled for a GPU that is not there, JAX cannot ask it whether it does.
    """
    on_gpu = platform() == "gpu" == jax.default_backend()
    return on_gpu and v.dtype in (jnp.bfloat16, jnp.float16) and v.shape[-1] <= 128 and v.shape[-1] % 8 == 0


def _cudnn_attention(q: Tokens, k: Tokens, v: Tokens) -> Tokens:
    b, n, _, _ = q.shape
    lengths = None
    if n % 2:  # The gradient of an odd number of tokens is refused.
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = jnp.full(b, n, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :n]


def scores_computed(n: int, *, causal: bool = False) -> int:
    """Return how many scores `attention` of n tokens has of each head, those too that are hidden within a block."""
    if not causal or n < BLOCKWISE_FROM:
        return n**2
    blocks, size = _size(n)
    return blocks * (blocks + 1) // 2 * size**2


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def blockwise_attention(q: Tokens, k: Tokens, v: Tokens, causal: bool = False) -> Tokens:
    """Compute softmax(Q K^T / sqrt(d)) V of each head, in memory that is linear in the tokens.

    Args:
        q: queries [b, n, h, d].
        k: keys [b, n, h, d].
        v: values [b, n, h, d].
        causal: whether a token sees those before and itself alone.

    Returns:
        The output [b, n, h, d] in v's dtype. Scores and sums are fp32, and products as exact as the inputs (see
        `contract`). The gradient computes the scores anew; forward differentiation (`jax.jvp`) is not defined.
    """
    return _forward(q, k, v, causal)[0]


def _forward(q: Tokens, k: Tokens, v: Tokens, causal: bool) -> tuple[Tokens, _Kept]:
    n, precision = q.shape[1], matmul_precision(q, k, v)
    queries, keys, values = (_blocks(x) for x in (_scaled(q), k, v))
    numbers = _numbers(n)
    # Each product finds it transposed, as a CPU multiplies fastest.
    keys = jnp.swapaxes(keys, -1, -2)

    def of_queries(_: None, block: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
        index, q, query = block

        def add_keys(carry: Running, block: tuple[Array, Array, Array]) -> Running:
            top, mass, out = carry
            k, v, key = block
            scores = contract("bhnd,bhdm->bhnm", q, k, precision)
            scores = jnp.where(_seen(query, key, n, causal), scores, -jnp.inf)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, kept = jnp.exp(scores - higher), jnp.exp(top - higher)
            mass = kept * mass + jnp.sum(weights, axis=-1, keepdims=True)
            out = kept * out + contract("bhnm,bhmd->bhnd", weights.astype(v.dtype), v, precision)
            return higher, mass, out

        nothing = jnp.zeros_like(q, jnp.float32)
        none = nothing[..., :1]
        end = index + 1 if causal else len(keys)
        top, mass, out = _over(0, end, add_keys, (none - jnp.inf, none, nothing), (keys, values, numbers))
        return None, (to_bits((out / mass).astype(v.dtype)), top + jnp.log(mass))

    _, (stored, log_sum) = jax.lax.scan(of_queries, None, (_indices(n), queries, numbers))
    out, log_sum = (_tokens(x, n) for x in (from_bits(stored, v.dtype), log_sum))
    return out, _Kept(q, k, v, out, log_sum)


def _backward(causal: bool, kept: _Kept, d_out: Tokens) -> tuple[Tokens, Tokens, Tokens]:
    q, k, v, out, log_sum = kept
    n, scale, precision = q.shape[1], q.shape[-1] ** -0.5, matmul_precision(q, k, v)
    # Of what a change of a query's every score by the same amount would do, which is nothing.
    shared = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    numbers = _numbers(n)
    of_queries = (_indices(n), *(_blocks(x) for x in (_scaled(q), d_out, log_sum, shared)), numbers)

    def of_keys(d_q: Array, block: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        index, k, v, key = block
        transposed_k, transposed_v = (jnp.swapaxes(x, -1, -2) for x in (k, v))

        def add_queries(carry: tuple[Array, ...], block: tuple[Array, ...]) -> tuple[Array, ...]:
            d_q, d_k, d_v = carry
            index, q, do, log_sum, shared, query = block
            scores = contract("bhnd,bhdm->bhnm", q, transposed_k, precision)
            masses = jnp.where(_seen(query, key, n, causal), jnp.exp(scores - log_sum), 0.0)
            d_scores = masses * (contract("bhnd,bhdm->bhnm", do, transposed_v, precision) - shared)
            masses, d_scores = masses.astype(v.dtype), d_scores.astype(k.dtype)
            d_v += contract("bhnm,bhnd->bhmd", masses, do, precision)
            d_k += contract("bhnm,bhnd->bhmd", d_scores, q, precision)
            return d_q.at[index].add(contract("bhnm,bhmd->bhnd", d_scores, k, precision)), d_k, d_v

        nothing = jnp.zeros_like(k, jnp.float32)
        begin = index if causal else 0
        d_q, *of_block = _over(begin, len(numbers), add_queries, (d_q, nothing, nothing), of_queries)
        return d_q, tuple(of_block)

    keys, values = _blocks(k), _blocks(v)
    d_q, (d_k, d_v) = jax.lax.scan(
        of_keys, jnp.zeros_like(keys, jnp.float32), (_indices(n), keys, values, numbers)
    )
    d_q, d_k, d_v = (_tokens(x, n) for x in (scale * d_q, d_k, d_v))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


blockwise_attention.defvjp(_forward, _backward)


def _scaled(q: Tokens) -> Tokens:
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _size(n: int) -> tuple[int, int]:
    """Return how many blocks n tokens make, as even as can be, and the tokens in each; none of them is empty."""
    blocks = -(-n // BLOCK)
    return blocks, -(-n // blocks)


def _indices(n: int) -> Int32[Array, " t"]:
    return jnp.arange(_size(n)[0], dtype=jnp.int32)


def _numbers(n: int) -> Int32[Array, "t m"]:
    """Return the number of each token of each block; those that just fill the last one up have n and more."""
    blocks, size = _size(n)
    return jnp.arange(blocks * size, dtype=jnp.int32).reshape(blocks, size)


def _seen(query: Int32[Array, " m"], key: Int32[Array, " m"], n: int, causal: bool) -> Any:
    """Return which keys of a block which of its queries see; of a causal one none is there that fills it up."""
    return key <= query[:, None] if causal else key < n


def _over(
    begin: int | Array, end: int | Array, step: Callable[[Any, Any], Any], carry: Any, blocks: Any
) -> Any:
    """Take one block after another, from number `begin` up to `end`, which need not be known to the compiler."""

    def take(index: Array, carry: Any) -> Any:
        return step(carry, jax.tree.map(lambda x: x[index], blocks))

    return jax.lax.fori_loop(begin, end, take, carry)


def _blocks(x: Tokens) -> Blocks:
    """Cut tokens into blocks, the last filled up with zeros."""
    b, n, h, d = x.shape
    blocks, size = _size(n)
    x = jnp.pad(x, ((0, 0), (0, blocks * size - n), (0, 0), (0, 0)))
    return jnp.transpose(x.reshape(b, blocks, size, h, d), (1, 0, 3, 2, 4))


def _tokens(x: Blocks, n: int) -> Tokens:
    """Invert `_blocks`."""
    blocks, b, h, size, d = x.shape
    return jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(b, blocks * size, h, d)[:, :n]
