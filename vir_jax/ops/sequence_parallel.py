"""Retention over a sequence, parallel form: O = (Q K^T .* D) V."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, matmul_precision
from vir_jax.ops.decay import decay_between, decay_power


def parallel(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b h n d"],
    v: Float[Array, "b h n e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h d e"] | None,
    *,
    reverse: bool,
) -> tuple[Float[Array, "b h n e"], Float32[Array, "b h d e"]]:
    """The masked einsum: n^2 scores, all at once. See `gradient` for the signature every form shares."""
    n = q.shape[2]
    precision = matmul_precision(q, k, v)
    time = jnp.arange(n)[::-1] if reverse else jnp.arange(n)

    scores = contract("bhnd,bhmd->bhnm", q, k, precision) * decay_between(log_decay, time, time)
    out = contract("bhnm,bhme->bhne", scores, v, precision)
    final = contract("bhnd,bhne->bhde", k * decay_power(log_decay, n - 1 - time)[..., None], v, precision)
    if arriving is not None:
        out += contract("bhnd,bhde->bhne", q * decay_power(log_decay, time)[..., None], arriving, precision)
        final += decay_power(log_decay, jnp.array(n - 1))[:, None, None] * arriving
    return out.astype(v.dtype), final
