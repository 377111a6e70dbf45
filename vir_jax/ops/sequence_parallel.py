"""Retention over a sequence, parallel form: O = (Q K^T .* D) V."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, matmul_precision
from vir_jax.ops.decay import decay_between, decay_power


def parallel(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h d e"] | None,
    *,
    reverse: bool,
    with_final: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h d e"] | None]:
    """Compute the masked einsum: n^2 scores, all at once. See `gradient` for the signature of every form."""
    n = q.shape[1]
    precision = matmul_precision(q, k, v)
    time = jnp.arange(n, dtype=jnp.int32)
    time = time[::-1] if reverse else time
    # The order in which a CPU multiplies fastest: both products with k find it transposed.
    q, k, v = jnp.swapaxes(q, 1, 2), jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2)

    scores = contract("bhnd,bhdm->bhnm", q, k, precision) * decay_between(log_decay, time, time)
    out = contract("bhnm,bhme->bhne", scores, v, precision)
    if arriving is not None:
        from_start = decay_power(log_decay, time)[..., None]
        out += from_start * contract("bhnd,bhde->bhne", q, arriving, precision)
    out = jnp.swapaxes(out.astype(v.dtype), 1, 2)
    if not with_final:
        return out, None
    to_end = decay_power(log_decay, n - 1 - time)[:, None]
    final = contract("bhdn,bhne->bhde", k * to_end, v, precision)
    if arriving is not None:
        final += decay_power(log_decay, jnp.int32(n - 1))[:, None, None] * arriving
    return out, final
