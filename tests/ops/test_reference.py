"""The loops against the closed form with the mask, and against finite differences, in float64."""

import numpy as np
import pytest

from tests.ops.cases import Case, assert_close, random_case
from vir_jax.ops.reference import (
    naive_retention,
    naive_retention_2d,
    naive_retention_2d_gradients,
    naive_retention_gradients,
)


def _numpy(case):
    return Case(*(np.asarray(x, np.float64) for x in case))


def _with_mask(case, exponent, visible):
    mask = np.exp(case.log_decay[:, None, None] * np.where(visible, exponent, 0)) * visible
    scores = np.einsum("bnhd,bmhd->bhnm", case.q, case.k) * mask
    return case.q.shape[-1] ** -0.5 * np.einsum("bhnm,bmhe->bnhe", scores, case.v)


def test_recurrence_is_the_masked_einsum():
    case = _numpy(random_case(n=20))
    elapsed = np.subtract.outer(np.arange(20), np.arange(20))
    out, _ = naive_retention(*case.tokens, case.log_decay)
    assert_close(out, _with_mask(case, elapsed, elapsed >= 0), 1e-14)


@pytest.mark.parametrize("trailing", [0, 1, 2])
def test_recurrence_2d_is_the_masked_einsum(trailing):
    rows, cols = grid = (3, 4)
    case = _numpy(random_case(n=rows * cols + trailing))
    y = np.append(np.repeat(np.arange(rows), cols), rows + np.arange(trailing))
    x = np.append(np.tile(np.arange(cols), rows), np.full(trailing, cols - 1))
    dy, dx = np.subtract.outer(y, y), np.subtract.outer(x, x)
    out, _ = naive_retention_2d(*case.tokens, case.log_decay, grid)
    assert_close(out, _with_mask(case, dx + dy, (dx >= 0) & (dy >= 0)), 1e-14)


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_gradients_are_finite_differences(grid):
    case = _numpy(random_case(b=1, n=7, h=2, d=3, e=2, cols=grid and grid[1]))
    options = {} if grid is None else {"grid": grid}
    forward = naive_retention if grid is None else naive_retention_2d
    backward = naive_retention_gradients if grid is None else naive_retention_2d_gradients

    def loss(q, k, v, log_decay, initial_state):
        out, final = forward(q, k, v, log_decay, initial_state=initial_state, **options)
        return np.sum(out * case.d_out) + np.sum(final * case.d_final)

    q, k, v, log_decay, state = case.arguments
    gradients = backward(
        q, k, v, log_decay, initial_state=state, d_out=case.d_out, d_final=case.d_final, **options
    )
    rng = np.random.default_rng(1)
    for i, gradient in enumerate(gradients):
        step = [np.zeros_like(x) for x in case.arguments]
        step[i] = 1e-5 * rng.normal(size=gradient.shape)
        up, down = (
            loss(*(x + sign * s for x, s in zip(case.arguments, step, strict=True))) for sign in (1, -1)
        )
        np.testing.assert_allclose((up - down) / 2, np.sum(gradient * step[i]), rtol=1e-7, atol=1e-12)
