import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.cases import random_case, relative_rms
from vir_jax.inspection import decay_at_arrival, decay_row, half_life, half_life_in_rows, on_grid
from vir_jax.ops import decay_mask, decay_mask_2d, retention, retention_2d, vir_log_decay

GRID = (3, 4)
LOG_DECAY = vir_log_decay(3)


def test_half_of_a_token_is_left_after_a_half_life():
    gamma = np.exp(np.asarray(LOG_DECAY, np.float64))
    np.testing.assert_allclose(gamma ** np.asarray(half_life(LOG_DECAY)), 0.5, rtol=1e-5)
    np.testing.assert_allclose(half_life(LOG_DECAY)[0], 21.83, atol=0.01)  # gamma = 31/32


def test_a_row_is_as_many_tokens_as_the_image_is_wide_in_1d_and_one_step_in_2d():
    gamma = np.exp(np.asarray(LOG_DECAY, np.float64))
    np.testing.assert_allclose(
        gamma ** (7 * np.asarray(half_life_in_rows(LOG_DECAY, 7, "1d"))), 0.5, rtol=1e-5
    )
    np.testing.assert_array_equal(half_life_in_rows(LOG_DECAY, 7, "2d"), half_life(LOG_DECAY))


@pytest.mark.parametrize("query", [0, 5, 11, 12, -1])
def test_rows_are_those_of_the_masks(query):
    np.testing.assert_array_equal(
        decay_row(LOG_DECAY, query, GRID, "1d"), decay_mask(13, LOG_DECAY)[:, query]
    )
    mask = decay_mask_2d(GRID, LOG_DECAY, trailing=1)
    np.testing.assert_array_equal(decay_row(LOG_DECAY, query, GRID, "2d"), mask[:, query])


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="tokens 0 to 12, the last the class token"):
        decay_row(LOG_DECAY, 13, GRID, "1d")
    with pytest.raises(ValueError, match="expected 13, or 25 in both directions"):
        on_grid(jnp.zeros((3, 12)), GRID)


def test_patches_fold_back_where_they_came_from():
    values = jnp.arange(13.0)
    np.testing.assert_array_equal(on_grid(values, GRID), np.arange(12.0).reshape(GRID))
    there_and_back = jnp.concatenate([values[:12], 100 * values[:12][::-1], values[12:]])
    np.testing.assert_array_equal(on_grid(there_and_back, GRID), 101 * np.arange(12.0).reshape(GRID))


def state_by_decay(case, read, kind):
    """The sum over patches with the decays at arrival."""
    decay = decay_at_arrival(case.log_decay, 12, GRID, kind)[:, read]
    return np.einsum("hm,bmhd,bmhe->bhde", decay, case.k, case.v)


@pytest.mark.parametrize("read", [1, 5, 12])
def test_decays_at_arrival_give_the_state_of_the_recurrence(read):
    case = random_case(n=12)
    tokens = (x[:, :read] for x in case.tokens)
    _, state = retention(*tokens, case.log_decay, mode="recurrent")
    assert relative_rms(state_by_decay(case, read, "1d"), state) < 1e-6
    assert not np.any(decay_at_arrival(case.log_decay, 12, GRID, "1d")[:, 0])


@pytest.mark.parametrize("read", [1, 4, 6, 8, 12])
def test_decays_at_arrival_give_the_grid_state_in_the_last_column(read):
    case = random_case(n=12)
    present = (np.arange(12) < read)[:, None, None]
    rows = -(-read // 4)
    tokens = (x[:, : 4 * rows] for x in (case.q, case.k * present, case.v))
    _, state = retention_2d(*tokens, case.log_decay, grid=(rows, 4), mode="recurrent")
    assert relative_rms(state_by_decay(case, read, "2d"), state[:, :, -1]) < 1e-6
