"""Retention over a sequence, chunkwise form: parallel inside a chunk, recurrent from chunk to chunk."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, matmul_precision
from vir_jax.ops.decay import decay_between, decay_power


def chunkwise(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b h n d"],
    v: Float[Array, "b h n e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h d e"] | None,
    *,
    chunk_size: int,
    reverse: bool,
) -> tuple[Float[Array, "b h n e"], Float32[Array, "b h d e"]]:
    """Chunks of `chunk_size` tokens, the last one ragged. See `gradient` for the signature every form shares."""
    (b, h, n, d), e = q.shape, v.shape[-1]
    precision = matmul_precision(q, k, v)
    size = min(chunk_size, n)
    chunks = -(-n // size)
    pad = chunks * size - n
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))).reshape(b, h, chunks, size, -1) for x in (q, k, v)
    )
    # Time inside each chunk; the padding of the last chunk is before its start or after its end.
    length = jnp.full([chunks, 1], size).at[-1].add(-pad)
    time = jnp.broadcast_to(jnp.arange(size), [chunks, size])
    time = length - 1 - time if reverse else time

    scores = contract("bhcnd,bhcmd->bhcnm", q, k, precision)
    scores = scores * decay_between(log_decay, time[0], time[0])[:, None]
    inside = contract("bhcnm,bhcme->bhcne", scores, v, precision)

    added = contract(
        "bhcnd,bhcne->cbhde", k * decay_power(log_decay, length - 1 - time)[..., None], v, precision
    )
    across = decay_power(log_decay, length[:, 0] - 1).T[..., None, None]
    decay = jnp.exp(log_decay)[:, None, None]

    def step(arriving, chunk):
        across, added = chunk
        state = across * arriving + added
        return decay * state, (arriving, state)

    start = jnp.zeros([b, h, d, e], jnp.float32) if arriving is None else arriving
    _, (arriving, states) = jax.lax.scan(step, start, (across, added), reverse=reverse)
    before = contract("bhcnd,cbhde->bhcne", q * decay_power(log_decay, time)[..., None], arriving, precision)
    out = (inside + before).reshape(b, h, chunks * size, e)[:, :, :n]
    return out.astype(v.dtype), states[0 if reverse else -1]
