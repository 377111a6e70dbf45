import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vir_jax.ops import decay_mask, decay_mask_2d, retnet_log_decay, vir_log_decay


def test_vir_rates():
    np.testing.assert_allclose(
        np.exp(vir_log_decay(6)), [0.96875, 0.98205, 0.98969, 0.99408, 0.99660, 0.99805], atol=5e-6
    )
    np.testing.assert_allclose(np.exp(vir_log_decay(1)), [1 - 1 / 32], rtol=1e-7)


def test_retnet_rates():
    np.testing.assert_allclose(np.exp(retnet_log_decay(3)), [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128], rtol=1e-7)


@pytest.mark.parametrize("rates", [vir_log_decay, retnet_log_decay])
def test_rates_are_fp32_logarithms(rates):
    log_decay = rates(16)
    assert log_decay.dtype == jnp.float32
    assert (np.diff(log_decay) > 0).all()
    assert (np.asarray(log_decay) < 0).all()
    with pytest.raises(ValueError, match="num_heads is 0"):
        rates(0)


def test_mask_is_a_power_of_the_time_elapsed():
    log_decay = vir_log_decay(3)
    gamma = np.exp(np.asarray(log_decay, np.float64))
    mask = decay_mask(50, log_decay)
    assert mask.dtype == jnp.float32
    for h in range(3):
        expected = [[gamma[h] ** (n - m) if n >= m else 0 for m in range(50)] for n in range(50)]
        np.testing.assert_allclose(mask[h], expected, rtol=1e-5)


def test_mask_of_no_decay_is_causal():
    np.testing.assert_array_equal(decay_mask(4, jnp.zeros(1))[0], np.tri(4))


@pytest.mark.parametrize(("grid", "trailing"), [((3, 5), 0), ((3, 5), 1), ((1, 4), 2), ((4, 1), 1)])
def test_mask_2d_is_a_power_of_the_steps_right_and_down(grid, trailing):
    log_decay = vir_log_decay(2)
    gamma = np.exp(np.asarray(log_decay, np.float64))
    rows, cols = grid
    positions = [(y, x) for y in range(rows) for x in range(cols)]
    positions += [(rows + j, cols - 1) for j in range(trailing)]
    mask = decay_mask_2d(grid, log_decay, trailing)
    assert mask.dtype == jnp.float32
    for n, (y, x) in enumerate(positions):
        for m, (ym, xm) in enumerate(positions):
            expected = gamma ** (x - xm + y - ym) if x >= xm and y >= ym else np.zeros(2)
            np.testing.assert_allclose(mask[:, n, m], expected, rtol=1e-5)


def test_mask_2d_is_separable():
    log_decay = vir_log_decay(2)
    rows, cols = decay_mask(3, log_decay), decay_mask(5, log_decay)
    for h in range(2):
        np.testing.assert_allclose(decay_mask_2d((3, 5), log_decay)[h], np.kron(rows[h], cols[h]), rtol=1e-6)


@pytest.mark.parametrize("log_decay", [0.0, -1e-8, -200.0])
def test_long_masks_have_finite_values_and_gradients(log_decay):
    value, grad = jax.value_and_grad(lambda a: decay_mask(3000, a).sum())(jnp.array([log_decay]))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
