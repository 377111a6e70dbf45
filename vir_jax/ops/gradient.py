"""The gradient of retention is retention: one rule for every form, in one dimension and in two.

An output and a final state are paired with their cotangents by one bilinear form. With K_m = k_m^T v_m,
Q_n = q_n^T do_n and D the decay mask,

    <do, o> + <dS, S> = sum_{n,m} D[n,m] <Q_n, K_m>,

where the arriving state counts into the first K and the cotangent dS of the final state into the last Q. Hence

    dq = retention of (do, v, k), forward in time,
    dk = retention of (v, do, q), backward in time, dS^T arriving at the end,
    dv = retention of (k, q, do), backward in time, dS arriving at the end; its final state is d arriving.

So nothing but the arguments is kept from the forward pass, neither scores nor a state per token, and a gradient of
a gradient costs no more memory than the first. For a = log(gamma), dD/da = (n - m) D[n,m] is bilinear again; any
form yields it by forward differentiation in a. Its terms are summed as they stand: the shorter
sum_n n (q_n . dq_n) - n (k_n . dk_n) is a small difference of two sums that grow with n.

Of decays per token, a_t = log(gamma_t), D[n,m] = exp(a_{m+1} + .. + a_n), so that dL/da_t is what all pairs yield that
lie on either side of the step to t. Each token before it takes up its keys' pairs and lets go of its query's:

    dL/da_t = <S, dS> arriving + sum_{n before t} k_n . dk_n - q_n . dq_n.

Every form is a function

    form(q, k, v, log_decay, arriving, *, reverse, with_final) -> (out, final)

of q, k [b, n, h, d], v [b, n, h, e], log_decay [h] (in one dimension also [b, n, h]) fp32 and arriving
[b, h, ..., d, e] fp32 (None is zero). `arriving` is the state that meets the first token, decayed on its way already;
`final` (fp32) the state after the last one, or None unless `with_final`; `out` has v's dtype. `reverse` runs time
backward: the last token is the first. (`grid_parallel` says what states are over a grid.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Float, Float32

from vir_jax.ops.decay import Decays

Result = tuple[Float[Array, "b n h e"], Float32[Array, "b h *x d e"] | None]
Form = Callable[..., Result]
Arguments = tuple[
    Float[Array, "b n h d"],
    Float[Array, "b n h d"],
    Float[Array, "b n h e"],
    Decays,
    Float32[Array, "b h *x d e"] | None,
]
Cotangents = tuple[Float[Array, "b n h e"] | SymbolicZero, Float32[Array, "b h *x d e"] | SymbolicZero | None]


def differentiable(
    form: Form,
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Decays,
    arriving: Float32[Array, "b h *x d e"] | None,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h *x d e"]]:
    """Return form(q, k, v, log_decay, arriving), to be differentiated in reverse any number of times.

    q and k have one dtype. A final state that nobody uses costs nothing under `jit`: the compiler drops what is
    computed for it alone, and its cotangent is a symbolic zero. (A kernel writes it all the same.)
    """
    # Under `jax.shard_map` the decay is shared by devices whose tokens differ, and its gradient must be summed over
    # them. Adding a sum over no token changes no value, but makes the decay vary as the tokens do.
    for tokens in (q, k, v):
        none, axes = (tokens[:, :0], (0, 1, 3)) if log_decay.ndim == 1 else (tokens[..., :0], (3,))
        log_decay = log_decay + jnp.sum(jax.lax.stop_gradient(none), axis=axes, dtype=jnp.float32)
    out, final = _retention(form, 0, False, True, q, k, v, log_decay, arriving)
    assert final is not None
    return out, final


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _retention(form: Form, order: int, reverse: bool, with_final: bool, *arguments: Any) -> Result:
    return _by_decay(form, order)(*arguments, reverse=reverse, with_final=with_final)


def _forward(
    form: Form, order: int, reverse: bool, with_final: bool, *primals: Any
) -> tuple[Result, Arguments]:
    arguments = custom_vjp_primal_tree_values(primals)
    return _retention(form, order, reverse, with_final, *arguments), arguments


def _backward(
    form: Form, order: int, reverse: bool, with_final: bool, arguments: Arguments, cotangents: Cotangents
) -> Arguments:
    q, k, v, log_decay, arriving = arguments
    do, d_final = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    do = jnp.zeros_like(v) if do is None else do
    onward = partial(_retention, form, order, reverse)
    backward = partial(_retention, form, order, not reverse)

    if log_decay.ndim == 3:
        return _backward_of_tokens(onward, backward, reverse, arguments, do, d_final)
    dq, _ = onward(False, do, v, k, log_decay, _transposed(arriving))
    dk, _ = backward(False, v, do, q, log_decay, _transposed(d_final))
    dv, d_arriving = backward(arriving is not None, k, q, do, log_decay, d_final)

    # In fp32, for (n - m) D outgrows fp16.
    of_decay = (q, k, v.astype(jnp.float32), log_decay, arriving)
    out_by_decay, final_by_decay = _retention(form, order + 1, reverse, with_final, *of_decay)
    d_log_decay = jnp.sum(do.astype(jnp.float32) * out_by_decay, axis=(0, 1, 3))
    if d_final is not None and final_by_decay is not None:
        d_log_decay += jnp.sum(d_final * final_by_decay, axis=(0, *range(2, d_final.ndim)))
    return dq, dk, dv, d_log_decay, d_arriving


def _backward_of_tokens(
    onward: Form,
    backward: Form,
    reverse: bool,
    arguments: Arguments,
    do: Float[Array, "b n h e"],
    d_final: Float32[Array, "b h d e"] | None,
) -> Arguments:
    """Compute the gradients where each token has decays of its own."""
    q, k, v, log_decay, arriving = arguments
    exact_q, exact_k = (
        q.astype(jnp.float32),
        k.astype(jnp.float32),
    )  # For d_log_decay is a difference of sums.
    dq, _ = onward(False, do, v, exact_k, log_decay, _transposed(arriving))
    dk, _ = backward(False, v, do, exact_q, log_decay, _transposed(d_final))
    dv, d_arriving = backward(arriving is not None, k, q, do, log_decay, d_final)

    taken_up = jnp.sum(exact_k * dk - exact_q * dq, axis=-1)
    taken_up = taken_up[:, 1:] if reverse else taken_up[:, :-1]
    d_steps = jax.lax.cumsum(taken_up, axis=1, reverse=reverse)
    if arriving is not None and d_arriving is not None:
        d_steps += jnp.sum(arriving * d_arriving, axis=(-2, -1))[:, None]
    # The first token's decay is in what arrives, or backward in time in nothing.
    d_log_decay = jnp.pad(d_steps, ((0, 0), (1, 0), (0, 0)))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv, d_log_decay, d_arriving


_retention.defvjp(_forward, _backward, symbolic_zeros=True)


def _transposed(state: Float32[Array, "b h *x d e"] | None) -> Float32[Array, "b h *x e d"] | None:
    return None if state is None else jnp.swapaxes(state, -1, -2)


def _by_decay(form: Form, order: int) -> Form:
    """Return the order-th derivative of form by log_decay: the same sums with the mask (n - m)^order D[n,m]."""
    if order == 0:
        return form

    def derivative(
        q: Array, k: Array, v: Array, log_decay: Array, arriving: Array | None, **options: bool
    ) -> Result:
        def of_decay(log_decay: Array) -> Result:
            return _by_decay(form, order - 1)(q, k, v, log_decay, arriving, **options)

        # A head depends on its own decay alone, so one tangent of ones serves all heads.
        return jax.jvp(of_decay, (log_decay,), (jnp.ones_like(log_decay),))[1]

    return derivative
