"""Inputs and measures that the tests of the ops share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vir_jax.ops import vir_log_decay


class Case(NamedTuple):
    """Arguments of retention with cotangents of its output and final state, all fp32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    initial_state: jax.Array
    d_out: jax.Array
    d_final: jax.Array

    @property
    def tokens(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.q, self.k, self.v

    @property
    def arguments(self) -> tuple[jax.Array, ...]:
        """Everything retention can be differentiated by."""
        return self[:5]

    @property
    def cotangents(self) -> tuple[jax.Array, jax.Array]:
        return self.d_out, self.d_final


def random_case(
    b: int = 2, n: int = 65, h: int = 3, d: int = 8, e: int = 5, *, cols: int | None = None, seed: int = 0
) -> Case:
    """Standard normal arrays; `cols` makes the state one of a grid."""
    rng = np.random.default_rng(seed)
    state = (b, h, d, e) if cols is None else (b, h, cols, d, e)
    shapes = [(b, n, h, d), (b, n, h, d), (b, n, h, e), state, (b, n, h, e), state]
    q, k, v, initial_state, d_out, d_final = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return Case(q, k, v, vir_log_decay(h), initial_state, d_out, d_final)


def relative_rms(actual: Any, expected: Any) -> float:
    """Root mean square of the difference over that of the expected values."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Every array of one tree is within a relative RMS error of its counterpart."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    errors = [relative_rms(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) <= tolerance, f"relative RMS errors {errors} above {tolerance}"
