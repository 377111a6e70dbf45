import jax.numpy as jnp
import numpy as np
import pytest

from tests.inspection.models import batch, model
from tests.models.helpers import lively
from vir_jax.inspection import errors_by_token, modes, retention_costs, tokens_by_mode
from vir_jax.ops import MODES


def test_errors_are_relative_to_the_first_mode_token_by_token():
    a = jnp.ones((2, 3, 4))
    b = a.at[:, 1].multiply(1.5).at[0, 2].multiply(0.0)
    zero = jnp.zeros((2, 3, 4))
    errors = errors_by_token({"a": a, "b": b, "zero": zero})
    assert list(errors) == [("a", "b"), ("a", "zero"), ("b", "zero")]
    np.testing.assert_allclose(errors["a", "b"], [0, 0.5, np.sqrt(0.5)])
    np.testing.assert_allclose(errors["a", "zero"], 1)
    assert not np.any(errors_by_token({"zero": zero, "same": zero})["zero", "same"])


def test_a_models_modes_differ_by_rounding_alone():
    errors = errors_by_token(tokens_by_mode(model("1d"), batch()))
    assert set(errors) == {(MODES[0], MODES[1]), (MODES[0], MODES[2]), (MODES[1], MODES[2])}
    assert all(error.shape == (13,) and error.max() < 1e-5 for error in errors.values())
    with pytest.raises(ValueError, match="expected retention"):
        tokens_by_mode(lively("vit_pico2", image_size=(6, 8)), batch())


def test_costs_of_retention(monkeypatch):
    costs = {(c.mode, c.grid[0]): c for c in retention_costs(2, 8, [(8, 8), (16, 16)], "2d", rounds=1)}
    assert set(costs) == {(mode, side) for mode in MODES for side in (8, 16)}
    assert all(cost.ms is not None and cost.ms > 0 for cost in costs.values())
    # Four times the tokens: 16 times the scores, but 4 times the tokens' own.
    growth = {mode: costs[mode, 16].temp_bytes / costs[mode, 8].temp_bytes for mode in MODES}
    assert growth["parallel"] > 2 * growth["recurrent"]
    scores = 4 * 2 * 257**2
    assert scores < costs["parallel", 16].temp_bytes < 20 * scores
    monkeypatch.setattr(modes, "MEMORY_LIMIT", 0)
    assert all(cost.ms is None for cost in retention_costs(2, 8, [(8, 8)], "1d"))
