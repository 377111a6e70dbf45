"""Inputs and measures that the tests of the ops share."""

import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vir_jax.ops import vir_log_decay
from vir_jax.ops.kernels import PLATFORMS

# Kernels in C++ are built by a compiler, which not every machine has, and run on CPUs alone.
NEEDS = {
    "cpu": [
        pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="a kernel for CPUs"),
        pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    ]
}
KERNELS = [pytest.param(name, marks=NEEDS.get(platform, [])) for name, platform in PLATFORMS.items()]
"""Names of kernels, as parameters of tests that use the fixture `kernels_run`, in a module that imports jax."""


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


def in_mode(mode: str, **chunk: int) -> dict[str, Any]:
    """What asks for a mode; with chunks of this size where it has chunks. Or for a kernel, which has its own."""
    if mode in PLATFORMS:
        return {"implementation": mode}
    return {"mode": mode} | (chunk if mode in ("chunkwise", "auto") else {})


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


def assert_transforms_agree(op: Callable[..., Any], case: Case, tolerance: float) -> None:
    """The output of `op(q, k, v, log_decay)` and its gradients are the same plain, under `jit`, `remat` and `vmap`."""

    def loss(q, k, v, log_decay):
        return jnp.sum(op(q, k, v, log_decay)[0] * case.d_out)

    def one_loss(q, k, v, log_decay, d_out):
        return jnp.sum(op(q[None], k[None], v[None], log_decay)[0] * d_out)

    @jax.jit
    def run(log_decay):
        plain = jax.value_and_grad(loss, (0, 1, 2))(*case.tokens, log_decay)
        remat = jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2))(*case.tokens, log_decay)
        each = jax.vmap(jax.value_and_grad(one_loss, (0, 1, 2)), (0, 0, 0, None, 0))
        losses, gradients = each(*case.tokens, log_decay, case.d_out)
        return plain, remat, (losses.sum(), gradients)

    plain, remat, mapped = run(case.log_decay)
    assert_close(plain[0], loss(*case.tokens, case.log_decay), tolerance)
    assert_close(remat, plain, tolerance)
    assert_close(mapped, plain, tolerance)
