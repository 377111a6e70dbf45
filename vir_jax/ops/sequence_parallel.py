"""Retention over a sequence, parallel form: O = (Q K^T .* D) V."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, matmul_precision
from vir_jax.ops.decay import Decays, decay_between, decay_between_tokens, decay_power


def parallel(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Decays,
    arriving: Float32[Array, "b h d e"] | None,
    *,
    reverse: bool,
    with_final: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h d e"] | None]:
    """Compute the masked einsum: n^2 scores, all at once. See `gradient` for the signature of every form."""
    precision = matmul_precision(q, k, v)
    mask, from_start, to_end, throughout = _decays(log_decay, q.shape[1], reverse=reverse)
    # The order in which a CPU multiplies fastest. Both products with k find it transposed, once: what decays on its way
    # into the state is v.
    q, k, v = jnp.swapaxes(q, 1, 2), jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2)

    scores = contract("bhnd,bhdm->bhnm", q, k, precision) * mask
    out = contract("bhnm,bhme->bhne", scores, v, precision)
    if arriving is not None:
        out += from_start * contract("bhnd,bhde->bhne", q, arriving, precision)
    out = jnp.swapaxes(out.astype(v.dtype), 1, 2)
    if not with_final:
        return out, None
    final = contract("bhdn,bhne->bhde", k, v * to_end, precision)
    if arriving is not None:
        final += throughout * arriving
    return out, final


def _decays(
    log_decay: Decays, n: int, *, reverse: bool
) -> tuple[
    Float32[Array, "*h n n"], Float32[Array, "*h n 1"], Float32[Array, "*h n 1"], Float32[Array, "*h 1 1"]
]:
    """Return the mask, and what is left of the first token (in time) at each, of each at the last, of first at last."""
    if log_decay.ndim == 3:
        mask = decay_between_tokens(log_decay)
        mask, first, last = (jnp.swapaxes(mask, 2, 3), n - 1, 0) if reverse else (mask, 0, n - 1)
        column, row = mask[..., first], mask[..., last, :]
        return mask, column[..., None], row[..., None], row[..., first, None, None]
    time = jnp.arange(n, dtype=jnp.int32)
    time = time[::-1] if reverse else time
    from_start, to_end = (decay_power(log_decay, elapsed) for elapsed in (time, n - 1 - time))
    throughout = decay_power(log_decay, jnp.int32(n - 1))
    mask = decay_between(log_decay, time, time)
    return mask, from_start[..., None], to_end[..., None], throughout[:, None, None]
