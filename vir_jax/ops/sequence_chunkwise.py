"""Retention over a sequence, chunkwise form: parallel inside a chunk, recurrent from chunk to chunk."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import empty_state
from vir_jax.ops.decay import Decays
from vir_jax.ops.sequence_parallel import parallel
from vir_jax.ops.storage import from_bits, to_bits


def chunkwise(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Decays,
    arriving: Float32[Array, "b h d e"] | None,
    *,
    chunk_size: int,
    reverse: bool,
    with_final: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h d e"] | None]:
    """Scan over chunks of `chunk_size` tokens. See `gradient` for the signature of every form."""
    n = q.shape[1]
    if n <= chunk_size:
        return parallel(q, k, v, log_decay, arriving, reverse=reverse, with_final=with_final)
    chunks = (n - 1) // chunk_size
    rest = n - chunks * chunk_size  # left for the last chunk in time, ragged or whole
    per_token = log_decay.ndim == 3
    gamma = jnp.exp(log_decay)[..., None, None]

    def chunk(
        arriving: Array, out: Array, start: Array | int, size: int, *, with_final: bool
    ) -> tuple[Array | None, Array]:
        part = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        here, state = parallel(
            part(q),
            part(k),
            part(v),
            part(log_decay) if per_token else log_decay,
            arriving,
            reverse=reverse,
            with_final=with_final,
        )
        return state, jax.lax.dynamic_update_slice_in_dim(out, to_bits(here), start, axis=1)

    def step(carry: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        state, out = chunk(*carry, start, chunk_size, with_final=True)
        assert state is not None
        # What the first token of the later chunk decays, which forward in time is the next one.
        later = start if reverse else start + chunk_size
        across = jax.lax.dynamic_index_in_dim(gamma, later, 1, keepdims=False) if per_token else gamma
        return (across * state, out), None

    arriving = empty_state(k, v) if arriving is None else arriving
    starts = (rest if reverse else 0) + chunk_size * jnp.arange(chunks, dtype=jnp.int32)
    # The output begins as v, all of which is overwritten: it has the shape, the dtype and the devices it needs.
    (passed, out), _ = jax.lax.scan(step, (arriving, to_bits(v)), starts, reverse=reverse)
    final, out = chunk(passed, out, 0 if reverse else n - rest, rest, with_final=with_final)
    return from_bits(out, v.dtype), final
