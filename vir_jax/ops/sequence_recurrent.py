"""Retention over a sequence, recurrent form: S_n = gamma S_{n-1} + k_n^T v_n, o_n = q_n S_n."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, empty_state, matmul_precision
from vir_jax.ops.decay import Decays
from vir_jax.ops.storage import from_bits, to_bits


def recurrent(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Decays,
    arriving: Float32[Array, "b h d e"] | None,
    *,
    reverse: bool,
    with_final: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h d e"] | None]:
    """Scan over tokens with one [d, e] state per head. See `gradient` for the signature of every form."""
    precision = matmul_precision(q, k, v)
    # What arrives was decayed on its way, so the first token meets it with a decay of one.
    decay = jnp.exp(log_decay)
    if log_decay.ndim == 3:
        # Backward in time a token is met by what its successor decays.
        decay = jnp.roll(jnp.moveaxis(decay, 1, 0), -1 if reverse else 0, axis=0)
    else:
        decay = jnp.ones([q.shape[1], 1], jnp.float32) * decay
    decay = decay.at[-1 if reverse else 0].set(1.0)

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, decay = token
        state = decay[..., None, None] * state + k[..., :, None].astype(jnp.float32) * v[..., None, :]
        return state, to_bits(contract("bhd,bhde->bhe", q, state, precision).astype(v.dtype))

    tokens = (*(jnp.moveaxis(x, 1, 0) for x in (q, k, v)), decay)
    state = empty_state(k, v) if arriving is None else arriving
    final, out = jax.lax.scan(step, state, tokens, reverse=reverse)
    return from_bits(jnp.moveaxis(out, 0, 1), v.dtype), final if with_final else None
