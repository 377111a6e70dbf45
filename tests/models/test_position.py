"""Position embeddings: resampling of learned ones, and sine-cosine ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import abstract, images, lively, parameters, run
from vir_jax.models import resample_position_embedding
from vir_jax.models.position import resampling_weights, sincos_position_embedding


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


@pytest.mark.parametrize("grid", [(3, 4), (7, 40), (2, 2)])
def test_a_part_of_a_grid_is_resampled_as_the_whole_is(grid):
    embedding = images((1, 3, 4, 8))
    expected = resample_position_embedding(embedding, grid)[0, 1:]
    rows = resampling_weights(3, jnp.int32(grid[0]), start=jnp.int32(1), count=grid[0] - 1)
    cols = resampling_weights(4, grid[1], count=grid[1])
    part = jnp.einsum("yi,xj,ijc->yxc", rows, cols, embedding[0])
    np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-5)


def test_rows_far_down_a_tall_image_are_resampled_exactly():
    whole = resampling_weights(14, 6250, count=6250)
    part = resampling_weights(14, 6250, start=6000, count=250)
    np.testing.assert_allclose(part, whole[6000:], atol=2e-5)
    np.testing.assert_allclose(part.sum(axis=1), 1, rtol=1e-5)


def test_sincos_of_known_angles():
    out = sincos_position_embedding(jnp.array([0, 3]), jnp.array([0, 2]), 8)
    np.testing.assert_allclose(out[0], [0, 0, 1, 1, 0, 0, 1, 1], atol=1e-6)
    y, x = np.array([3, 0.03]), np.array([2, 0.02])  # Frequencies 1 and 1/100.
    np.testing.assert_allclose(out[1], [*np.sin(y), *np.cos(y), *np.sin(x), *np.cos(x)], rtol=1e-5)


def test_a_model_with_sincos_learns_no_position_and_takes_any_size():
    model = lively("vir_pico2", image_size=(6, 8), position="sincos")
    learned = parameters(abstract("vir_pico2", image_size=(6, 8)))
    assert learned.keys() - parameters(model).keys() == {"stem.position.embedding"}
    for rows, cols in ((3, 4), (2, 5)):
        x = images((1, 2 * rows, 2 * cols, 3))
        found = run(model, x, "intermediates", names=("patch_tokens", "tokens"))
        y, x = jnp.divmod(jnp.arange(rows * cols), cols)
        added = found["tokens"][0, :-1] - found["patch_tokens"][0]
        np.testing.assert_allclose(added, sincos_position_embedding(y, x, 64), atol=1e-5)
