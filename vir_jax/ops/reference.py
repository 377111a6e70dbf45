"""The recurrences as they are written, one token after another, in float64 NumPy: the specification.

Slow on purpose. Every other form of retention is held to these loops.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def naive_retention(
    q: Float[ndarray, "b n h d"],
    k: Float[ndarray, "b n h d"],
    v: Float[ndarray, "b n h e"],
    log_decay: Float[ndarray, "h"],
    *,
    initial_state: Float[ndarray, "b h d e"] | None = None,
    scale: float | None = None,
) -> tuple[Float[ndarray, "b n h e"], Float[ndarray, "b h d e"]]:
    """S_n = gamma S_{n-1} + k_n^T v_n, o_n = q_n S_n (PAPER section 1). Returns every o_n and the last state."""
    q, k, v, gamma = (np.asarray(x, np.float64) for x in (q, k, v, np.exp(np.asarray(log_decay, np.float64))))
    (b, n, h, d), e = q.shape, v.shape[-1]
    scale = d**-0.5 if scale is None else scale
    out = np.zeros([b, n, h, e])
    states = np.zeros([b, h, d, e]) if initial_state is None else np.array(initial_state, np.float64)
    for i in range(b):
        for j in range(h):
            state = states[i, j]
            for t in range(n):
                state = gamma[j] * state + np.outer(k[i, t, j], v[i, t, j])
                out[i, t, j] = scale * q[i, t, j] @ state
            states[i, j] = state
    return out, states


def naive_retention_2d(
    q: Float[ndarray, "b n h d"],
    k: Float[ndarray, "b n h d"],
    v: Float[ndarray, "b n h e"],
    log_decay: Float[ndarray, "h"],
    *,
    grid: tuple[int, int],
    initial_state: Float[ndarray, "b h x d e"] | None = None,
    scale: float | None = None,
) -> tuple[Float[ndarray, "b n h e"], Float[ndarray, "b h x d e"]]:
    """S[y,x] = g S[y,x-1] + g S[y-1,x] - g^2 S[y-1,x-1] + k^T v, o[y,x] = q S[y,x] (PAPER section 2).

    After the grid, trailing tokens stand each in the last column of a further row, empty but for them. Returns
    every o and the states of the last row, trailing ones included.
    """
    q, k, v, gamma = (np.asarray(x, np.float64) for x in (q, k, v, np.exp(np.asarray(log_decay, np.float64))))
    (b, n, h, d), e = q.shape, v.shape[-1]
    rows, cols = grid
    scale = d**-0.5 if scale is None else scale
    positions = [(y, x) for y in range(rows) for x in range(cols)]
    positions += [(rows + j, cols - 1) for j in range(n - rows * cols)]
    token_at = {position: t for t, position in enumerate(positions)}
    last_row = positions[-1][0]

    out = np.zeros([b, n, h, e])
    final = np.zeros([b, h, cols, d, e])
    for i in range(b):
        for j in range(h):
            g = gamma[j]
            # One row and one column of margin: S[-1, x] is the state that arrives, S[y, -1] is zero.
            state = np.zeros([last_row + 2, cols + 1, d, e])
            if initial_state is not None:
                state[0, 1:] = initial_state[i, j]
            for y in range(last_row + 1):
                for x in range(cols):
                    left, up, up_left = state[y + 1, x], state[y, x + 1], state[y, x]
                    state[y + 1, x + 1] = g * left + g * up - g**2 * up_left
                    if (y, x) in token_at:
                        t = token_at[y, x]
                        state[y + 1, x + 1] += np.outer(k[i, t, j], v[i, t, j])
                        out[i, t, j] = scale * q[i, t, j] @ state[y + 1, x + 1]
            final[i, j] = state[-1, 1:]
    return out, final
