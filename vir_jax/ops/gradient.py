"""The gradient of retention is retention, in every form, in one dimension and in two.

Retention and its final state together are one bilinear form. With K_m = k_m^T v_m, Q_n = q_n^T do_n for an
output cotangent do, and D the decay mask,

    <do, o> + <dS, S> = sum_{n, m} D[n, m] <Q_n, K_m>,

where the arriving state is part of the first K and the cotangent dS of the final state part of the last Q. So

    dq     = retention of (do, v, k)                     forward in time
    dk     = retention of (v, do, q)                     backward in time, dS arriving at the end
    dv     = retention of (k, q, do)                     backward in time, dS arriving at the end
    d arriving = the final state of that last one.

Nothing but the arguments is kept from the forward pass: no state per token, no score. The derivative by log_decay
a has the mask dD/da = (n - m) D[n, m], which any form gives by forward differentiation in the scalar a,
and is again bilinear in K and Q. Its positive terms are summed as they stand: the shorter route over
sum_n n (q_n . dq_n - k_n . dk_n) subtracts two sums that agree to a part in n.

Every form is a function

    form(q, k, v, log_decay, arriving, *, reverse) -> (out, final)

    q, k [b, n, h, d], v [b, n, h, e], log_decay [h] fp32, arriving [b, h, ..., d, e] fp32 or None for zero;
    arriving is what reaches the first token, already decayed on its way; final is the state after the last token;
    reverse runs time backward, so that the last token is the first; out has v's dtype, final is fp32.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

Form = Callable[..., tuple[Float[Array, "b n h e"], Float32[Array, "b h ..."]]]
Result = tuple[Float[Array, "b n h e"], Float32[Array, "b h ..."] | None]


def _derivative(form: Form, order: int) -> Form:
    """The order-th derivative of form by log_decay: the same sums with the mask (n - m)^order D[n, m]."""
    if order == 0:
        return form

    def differentiated(q, k, v, log_decay, arriving, *, reverse):
        def of_decay(log_decay):
            return _derivative(form, order - 1)(q, k, v, log_decay, arriving, reverse=reverse)

        return jax.jvp(of_decay, (log_decay,), (jnp.ones_like(log_decay),))[1]

    return differentiated


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _bilinear(form, order, reverse, with_final, q, k, v, log_decay, arriving) -> Result:
    out, final = _derivative(form, order)(q, k, v, log_decay, arriving, reverse=reverse)
    return out, final if with_final else None


def _forward(form, order, reverse, with_final, *args):
    return _bilinear(form, order, reverse, with_final, *args), args


def _transposed(state):
    return None if state is None else jnp.swapaxes(state, -1, -2)


def _backward(form, order, reverse, with_final, args, cotangents):
    q, k, v, log_decay, arriving = args
    d_out, d_final = cotangents
    with_arriving = arriving is not None

    dq, _ = _bilinear(form, order, reverse, False, d_out, v, k, log_decay, _transposed(arriving))
    dk, _ = _bilinear(form, order, not reverse, False, v, d_out, q, log_decay, _transposed(d_final))
    dv, d_arriving = _bilinear(form, order, not reverse, with_arriving, k, q, d_out, log_decay, d_final)

    by_decay, final_by_decay = _bilinear(form, order + 1, reverse, with_final, q, k, v, log_decay, arriving)
    d_log_decay = jnp.einsum("bnhe,bnhe->h", d_out, by_decay, preferred_element_type=jnp.float32)
    if with_final:
        d_log_decay += jnp.einsum("bh...,bh...->h", d_final, final_by_decay)
    return dq, dk, dv, d_log_decay, d_arriving


_bilinear.defvjp(_forward, _backward)


def differentiable(
    form: Form,
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h ..."] | None,
    *,
    with_final: bool,
) -> Result:
    """form(q, k, v, log_decay, arriving) with the gradient above, to any order of reverse differentiation.

    q and k have one dtype. Returns (out, final), final being None unless asked for.
    """
    return _bilinear(form, 0, False, with_final, q, k, v, log_decay, arriving)
