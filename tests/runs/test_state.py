import chex
import jax.numpy as jnp
import pytest

from vir_jax.runs.state import ema_decay, update_ema


def test_ema_by_hand():
    ema = {"w": jnp.array([1.0])}
    ema = update_ema(ema, {"w": jnp.array([3.0])}, jnp.int32(0), 0.5)  # Decay min(0.5, 1/10).
    chex.assert_trees_all_close(ema, {"w": jnp.array([0.1 * 1 + 0.9 * 3])}, rtol=1e-6)
    ema = update_ema(ema, {"w": jnp.array([0.8])}, jnp.int32(100), 0.5)  # Decay min(0.5, 101/110).
    chex.assert_trees_all_close(ema, {"w": jnp.array([0.5 * 2.8 + 0.5 * 0.8])}, rtol=1e-6)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (80, 0.9), (44_989, 0.9998), (10**6, 0.9998)])
def test_ema_decay_warms_up(step, expected):
    assert float(ema_decay(jnp.int32(step), 0.9998)) == pytest.approx(expected, rel=1e-6)
