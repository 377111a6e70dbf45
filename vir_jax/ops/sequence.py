"""Retention over a sequence: one function, every mode."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.checks import check_log_decay, check_mode, check_positive, check_state, check_tokens
from vir_jax.ops.gradient import Form, differentiable
from vir_jax.ops.sequence_chunkwise import chunkwise
from vir_jax.ops.sequence_parallel import parallel
from vir_jax.ops.sequence_recurrent import recurrent

CHUNK_SIZE = 64
PARALLEL_UP_TO = 128


def retention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    *,
    mode: str = "auto",
    chunk_size: int | None = None,
    initial_state: Float32[Array, "b h d e"] | None = None,
    return_state: bool = False,
    scale: float | None = None,
) -> Float[Array, "b n h e"] | tuple[Float[Array, "b n h e"], Float32[Array, "b h d e"]]:
    """Retention (PAPER section 1)."""
    check_mode(mode)
    check_positive("chunk_size", chunk_size)
    check_tokens(q, k, v)
    b, n, h, d = q.shape
    check_log_decay(log_decay, h)
    check_state("initial_state", initial_state, (b, h, d, v.shape[-1]))
    out, state = _retention(q, k, v, log_decay, initial_state, mode, chunk_size, return_state, scale)
    return (out, state) if return_state else out


def retention_step(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    state: Float32[Array, "b h d e"],
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h d e"]]:
    """The next token (n = 1) or the next chunk of n tokens, given the state after those before."""
    return retention(q, k, v, log_decay, initial_state=state, return_state=True, scale=scale)


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _retention(q, k, v, log_decay, initial_state, mode, chunk_size, return_state, scale):
    q, k = prepare(q, k, scale)
    gamma = jnp.exp(log_decay)[:, None, None]
    arriving = None if initial_state is None else gamma * initial_state
    form = choose_form(mode, q.shape[1], chunk_size)
    return differentiable(form, q, k, v, log_decay, arriving, with_final=return_state)


def prepare(q, k, scale):
    """q scaled (by d^-1/2 unless told), in one dtype with k."""
    dtype = jnp.promote_types(q.dtype, k.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q.astype(jnp.float32) * scale).astype(dtype), k.astype(dtype)


def choose_form(mode: str, n: int, chunk_size: int | None) -> Form:
    """The form that `mode` names, for n tokens."""
    if mode == "auto":
        mode = "recurrent" if n == 1 else "parallel" if n <= PARALLEL_UP_TO else "chunkwise"
    if mode == "chunkwise":
        return partial(chunkwise, chunk_size=chunk_size or CHUNK_SIZE)
    return {"parallel": parallel, "recurrent": recurrent}[mode]
