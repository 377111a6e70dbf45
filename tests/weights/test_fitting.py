import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.weights.make import filled
from tests.weights.helpers import golden
from vir_jax.models import resample_position_embedding
from vir_jax.models.position import resampling_weights
from vir_jax.weights.fitting import (
    bicubic_of_torch,
    fit_colours,
    fit_patch,
    fit_positions,
    fit_statistics,
    matching_classes,
)


def ours(size, new_size):
    return np.asarray(resampling_weights(size, new_size, count=new_size))


@pytest.mark.parametrize("grid", [(4, 6), (9, 5), (2, 3)])
def test_positions_are_resampled_as_the_model_does_at_other_sizes(grid):
    embedding = filled("x", (1, 4, 6, 8))
    expected = resample_position_embedding(jnp.asarray(embedding), grid)
    np.testing.assert_allclose(fit_positions(embedding, grid, ours), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "new_size"), [(4, 4), (4, 7), (7, 4), (1, 3)])
def test_bicubic_keeps_constants_and_itself(size, new_size):
    weights = bicubic_of_torch(size, new_size)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    if size == new_size:
        np.testing.assert_allclose(weights, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("patch", [2, 3, 4, 6, 8])
def test_patches_are_resized_as_timm_does(patch):
    kernel = filled("kernel", (2, 3, 4, 4)).transpose(2, 3, 1, 0)
    expected = np.asarray(golden("patches")[str(patch)]).transpose(2, 3, 1, 0)
    np.testing.assert_allclose(fit_patch(kernel, patch), expected, atol=1e-5)


def test_a_kernel_for_larger_patches_gives_of_enlarged_ones_the_same():
    kernel = filled("kernel", (4, 4, 3, 2)).astype(np.float64)
    patches = filled("pixels", (5, 4, 4, 3)).astype(np.float64)
    enlarged = np.einsum("yi,xj,bijk->byxk", ours(4, 6), ours(4, 6), patches)
    outputs = np.einsum("byxk,yxkc->bc", patches, kernel)
    # The weights of resampling are float32.
    np.testing.assert_allclose(
        np.einsum("byxk,yxkc->bc", enlarged, fit_patch(kernel, 6)), outputs, rtol=1e-4, atol=1e-5
    )


def test_a_kernel_of_rgb_gives_of_grey_what_one_of_grey_does():
    kernel = filled("kernel", (4, 4, 3, 5))
    grey = filled("grey", (4, 4, 1))
    as_rgb = np.einsum("yxk,yxkc->c", np.repeat(grey, 3, axis=2), kernel)
    np.testing.assert_allclose(np.einsum("yxk,yxkc->c", grey, fit_colours(kernel, 1)), as_rgb, rtol=1e-4)
    np.testing.assert_allclose(
        fit_colours(fit_colours(kernel, 1), 3).sum(2), kernel.sum(2), rtol=1e-4, atol=1e-6
    )


def test_a_fourth_channel_begins_as_the_mean_and_is_left_out_again():
    kernel = np.array([[[[3.0], [1.0], [2.0]]]], np.float32)
    four = fit_colours(kernel, 4)
    np.testing.assert_array_equal(four[0, 0, :, 0], [3, 1, 2, 2])
    np.testing.assert_array_equal(fit_colours(four, 3), kernel)
    np.testing.assert_array_equal(fit_colours(four, 1)[0, 0, :, 0], [6])
    np.testing.assert_array_equal(fit_colours(fit_colours(kernel, 1), 4)[0, 0, :, 0], [2, 2, 2, 2])
    assert fit_colours(four, 4) is four


def test_means_of_other_channels():
    assert fit_statistics((0.25, 0.5, 0.75), 1) == (0.5,)
    assert fit_statistics((0.5,), 3) == (0.5, 0.5, 0.5)
    assert fit_statistics((0.25, 0.5, 0.75), 4) == (0.25, 0.5, 0.75, 0.5)
    assert fit_statistics((0.1, 0.2, 0.3, 0.9), 3) == (0.1, 0.2, 0.3)


def test_classes_match_by_name():
    assert matching_classes(["ant", "bee", "cat"], ["dog", "cat", "ant"]) == {1: 2, 2: 0}
    assert matching_classes(None, ["ant"]) == matching_classes(["ant"], None) == {}
