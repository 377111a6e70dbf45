"""Resampling of position embeddings."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import images
from vir_jax.models import resample_position_embedding


def test_identity_on_the_same_grid():
    embedding = images((1, 3, 4, 8))
    assert resample_position_embedding(embedding, (3, 4)) is embedding


@pytest.mark.parametrize("grid", [(1, 1), (3, 9), (6, 8), (2, 3), (16, 1)])
def test_any_grid_keeps_constants(grid):
    out = resample_position_embedding(jnp.full((1, 3, 4, 8), 0.7), grid)
    assert out.shape == (1, *grid, 8)
    np.testing.assert_allclose(out, 0.7, rtol=1e-5)


def test_rows_and_columns_are_not_mixed_up_and_ramps_stay_ramps():
    y, x = np.indices((8, 12), np.float32)
    out = resample_position_embedding(jnp.stack([y, x], -1)[None], (16, 36))[0]
    # Pixel centres: row i of the fine grid lies at (i + 1/2) / 2 - 1/2 of the coarse one.
    np.testing.assert_allclose(out[4:-4, 0, 0], (np.arange(4, 12) + 0.5) / 2 - 0.5, atol=1e-4)
    np.testing.assert_allclose(out[0, 6:-6, 1], (np.arange(6, 30) + 0.5) / 3 - 0.5, atol=1e-4)


def test_shrinking_averages_instead_of_skipping():
    alternating = jnp.tile(jnp.array([1.0, -1.0]), 16)[None, None, :, None]
    out = resample_position_embedding(jnp.broadcast_to(alternating, (1, 8, 32, 1)), (8, 8))
    assert float(jnp.max(jnp.abs(out[:, :, 1:-1]))) < 0.05
