"""The recurrences as they are written, one token after another, in float64 NumPy: the specification.

Slow on purpose. Every form of retention and of its gradient is held to these loops. They share no code with them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

FloatArray = Float[ndarray, "..."]


class Gradients(NamedTuple):
    """Hold the gradients of <do, o> + <dS, S> by every argument, float64."""

    q: FloatArray
    k: FloatArray
    v: FloatArray
    log_decay: FloatArray
    initial_state: FloatArray


def naive_retention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    log_decay: FloatArray,
    initial_state: FloatArray | None = None,
    scale: float | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Compute S_n = gamma_n S_{n-1} + k_n^T v_n, o_n = scale q_n S_n (docs/method.md, section 1).

    q, k [b, n, h, d], v [b, n, h, e], log_decay [h] or [b, n, h]. Returns o [b, n, h, e] and the last S [b, h, d, e].
    """
    q, k, v, gamma, scale = _prepare(q, k, v, log_decay, scale)
    (b, n, h, d), e = q.shape, v.shape[-1]
    gamma = np.broadcast_to(gamma, [b, n, h])
    out, final = np.zeros([b, n, h, e]), np.zeros([b, h, d, e])
    for i, j in np.ndindex(b, h):
        state = np.zeros([d, e]) if initial_state is None else np.asarray(initial_state[i, j], np.float64)
        for t in range(n):
            state = gamma[i, t, j] * state + np.outer(k[i, t, j], v[i, t, j])
            out[i, t, j] = scale * q[i, t, j] @ state
        final[i, j] = state
    return out, final


def naive_retention_gradients(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    log_decay: FloatArray,
    initial_state: FloatArray,
    d_out: FloatArray,
    d_final: FloatArray,
    scale: float | None = None,
) -> Gradients:
    """Go back through the recurrence: G_n = dL/dS_n = scale q_n^T do_n + gamma_{n+1} G_{n+1}, every S_n being kept.

    dq_n = scale S_n do_n, dk_n = G_n v_n, dv_n = k_n G_n, dL/d log gamma_n = <G_n, gamma_n S_{n-1}>; of one decay per
    head the sum over all b and n.
    """
    q, k, v, gamma, scale = _prepare(q, k, v, log_decay, scale)
    (b, n, h, d), e = q.shape, v.shape[-1]
    per_head = gamma.ndim == 1
    gamma = np.broadcast_to(gamma, [b, n, h])
    grads = Gradients(*(np.zeros(x.shape) for x in (q, k, v, gamma, initial_state)))
    for i, j in np.ndindex(b, h):
        states = np.zeros([n + 1, d, e])
        states[0] = initial_state[i, j]
        for t in range(n):
            states[t + 1] = gamma[i, t, j] * states[t] + np.outer(k[i, t, j], v[i, t, j])
        adjoint: FloatArray = np.asarray(d_final[i, j], np.float64)
        for t in reversed(range(n)):
            adjoint = adjoint + scale * np.outer(q[i, t, j], d_out[i, t, j])
            grads.q[i, t, j] = scale * states[t + 1] @ d_out[i, t, j]
            grads.k[i, t, j] = adjoint @ v[i, t, j]
            grads.v[i, t, j] = k[i, t, j] @ adjoint
            adjoint = gamma[i, t, j] * adjoint
            grads.log_decay[i, t, j] = np.sum(adjoint * states[t])
        grads.initial_state[i, j] = adjoint
    return grads._replace(log_decay=grads.log_decay.sum((0, 1))) if per_head else grads


def naive_retention_2d(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    log_decay: FloatArray,
    grid: tuple[int, int],
    initial_state: FloatArray | None = None,
    scale: float | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Compute S[y,x] = g S[y,x-1] + g S[y-1,x] - g^2 S[y-1,x-1] + k^T v, o[y,x] = scale q S[y,x].

    The recurrence of docs/method.md, section 2. Trailing tokens stand each in the last column of a further row that is
    empty but for them. Returns o [b, n, h, e] and the states of the last row, [b, h, cols, d, e].
    """
    q, k, v, gamma, scale = _prepare(q, k, v, log_decay, scale)
    (b, n, h, d), e, cols = q.shape, v.shape[-1], grid[1]
    out, final = np.zeros([b, n, h, e]), np.zeros([b, h, cols, d, e])
    for i, j in np.ndindex(b, h):
        above = None if initial_state is None else initial_state[i, j]
        states = _grid_states(k[i, :, j], v[i, :, j], float(gamma[j]), grid, above)
        for t, (y, x) in enumerate(_positions(n, grid)):
            out[i, t, j] = scale * q[i, t, j] @ states[y + 1, x + 1]
        final[i, j] = states[-1, 1:]
    return out, final


def naive_retention_2d_gradients(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    log_decay: FloatArray,
    grid: tuple[int, int],
    initial_state: FloatArray,
    d_out: FloatArray,
    d_final: FloatArray,
    scale: float | None = None,
) -> Gradients:
    """Go back through the 2-D recurrence, every S[y,x] being kept.

    G[y,x] = scale q^T do + g G[y,x+1] + g G[y+1,x] - g^2 G[y+1,x+1] is dL/dS[y,x]; d_final adds to the last row's.
    """
    q, k, v, gamma, scale = _prepare(q, k, v, log_decay, scale)
    n, cols = q.shape[1], grid[1]
    positions = _positions(n, grid)
    token_at = {position: t for t, position in enumerate(positions)}
    grads = Gradients(*(np.zeros(t.shape) for t in (q, k, v, gamma, initial_state)))
    for i, j in np.ndindex(q.shape[0], q.shape[2]):
        g = float(gamma[j])
        states = _grid_states(k[i, :, j], v[i, :, j], g, grid, initial_state[i, j])
        adjoint = np.zeros_like(states)  # adjoint[y + 1, x + 1] is dL/dS[y,x], as states has it
        adjoint[-1, 1:] = d_final[i, j]
        for y in reversed(range(positions[-1][0] + 1)):
            for x in reversed(range(cols)):
                own = adjoint[y + 1, x + 1]
                if (y, x) in token_at:
                    t = token_at[y, x]
                    own += scale * np.outer(q[i, t, j], d_out[i, t, j])
                    grads.q[i, t, j] = scale * states[y + 1, x + 1] @ d_out[i, t, j]
                    grads.k[i, t, j] = own @ v[i, t, j]
                    grads.v[i, t, j] = k[i, t, j] @ own
                left, up, up_left = states[y + 1, x], states[y, x + 1], states[y, x]
                grads.log_decay[j] += np.sum(own * (g * left + g * up - 2 * g**2 * up_left))
                adjoint[y + 1, x] += g * own
                adjoint[y, x + 1] += g * own
                adjoint[y, x] -= g**2 * own
        grads.initial_state[i, j] = adjoint[0, 1:]
    return grads


def _prepare(
    q: FloatArray, k: FloatArray, v: FloatArray, log_decay: FloatArray, scale: float | None
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, float]:
    q, k, v, log_decay = (np.asarray(x, np.float64) for x in (q, k, v, log_decay))
    return q, k, v, np.exp(log_decay), q.shape[-1] ** -0.5 if scale is None else scale


def _positions(n: int, grid: tuple[int, int]) -> list[tuple[int, int]]:
    rows, cols = grid
    patches = [(y, x) for y in range(rows) for x in range(cols)]
    return patches + [(rows + j, cols - 1) for j in range(n - rows * cols)]


def _grid_states(
    k: FloatArray, v: FloatArray, g: float, grid: tuple[int, int], above: FloatArray | None
) -> FloatArray:
    """Return S[y,x] at [y + 1, x + 1]; row 0 is the state above the first row, column 0 is zero."""
    positions = _positions(len(k), grid)
    token_at = {position: t for t, position in enumerate(positions)}
    states = np.zeros([positions[-1][0] + 2, grid[1] + 1, k.shape[-1], v.shape[-1]])
    if above is not None:
        states[0, 1:] = above
    for y in range(positions[-1][0] + 1):
        for x in range(grid[1]):
            states[y + 1, x + 1] = g * states[y + 1, x] + g * states[y, x + 1] - g**2 * states[y, x]
            if (y, x) in token_at:
                t = token_at[y, x]
                states[y + 1, x + 1] += np.outer(k[t], v[t])
    return states
