"""Convolutional stems: linear as in Vision X-formers, or with norms; how far a token sees, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import images, lively, run
from vir_jax.inference import stream
from vir_jax.models.embedding import ConvEmbedding, ViXEmbedding


@pytest.fixture(scope="module", params=[ConvEmbedding, ViXEmbedding])
def kind(request):
    return request.param


def made(kind, patch=1, dim=16):
    embedding = kind(patch, dim, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for index, conv in enumerate(embedding.convs):
        conv.bias[...] = 0.1 * images((conv.bias.shape[0],)) + index
    return embedding


def sees(embedding, size, token):
    """Which pixels change a token, by row and by column."""
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(embedding(x)[0, *token] ** 2)))(images((1, size, size, 3)))
    rows, cols = np.nonzero(np.any(np.asarray(gradient[0]) != 0, axis=-1))
    return (rows.min(), rows.max()), (cols.min(), cols.max())


def test_vix_is_linear_and_practice_is_not():
    x = images((1, 9, 9, 3))
    for kind, linear in ((ViXEmbedding, True), (ConvEmbedding, False)):
        embedding = made(kind)
        of_zero, once, twice = (embedding(y) for y in (jnp.zeros_like(x), x, 2 * x))
        assert np.allclose(twice - of_zero, 2 * (once - of_zero), atol=1e-4) == linear


def test_of_zeros_the_inside_is_what_the_biases_make():
    embedding = made(ViXEmbedding)
    inside = embedding(jnp.zeros((1, 9, 9, 3)))[0, 3:-3, 3:-3]
    value = jnp.zeros(3)
    for conv in embedding.convs:
        value = jnp.einsum("c,yxcd->d", value, conv.kernel[...]) + conv.bias[...]
    np.testing.assert_allclose(inside, jnp.broadcast_to(value, inside.shape), rtol=1e-4, atol=1e-5)


def test_a_token_sees_seven_by_seven_pixels_in_raster_order(kind):
    assert made(kind)(images((1, 6, 5, 3))).shape == (1, 6, 5, 16)
    assert sees(made(kind), 11, (5, 4)) == ((2, 8), (1, 7))


@pytest.mark.parametrize(
    ("patch", "strides", "reach"), [(2, (2, 1, 1), 5), (4, (2, 2, 1), 7), (16, (2,) * 4, 15)]
)
def test_a_patch_halves_the_image_so_often(kind, patch, strides, reach):
    embedding = made(kind, patch)
    assert embedding.strides == strides
    assert embedding(images((1, 4 * patch, 2 * patch, 3))).shape == (1, 4, 2, 16)
    (first, last), _ = sees(embedding, 4 * patch, (2, 2))
    assert (first, last) == (max(2 * patch - reach, 0), min(2 * patch + reach, 4 * patch - 1))


def test_channels_can_be_halved(kind):
    with pytest.raises(
        ValueError, match="doubles its channels 2 times, to 18 at last: expected a multiple of 4"
    ):
        made(kind, dim=18)


@pytest.mark.parametrize("stem", ["conv", "conv_vix"])
def test_a_model_with_one_is_not_streamed(stem):
    model = lively("vir_pico2", image_size=(6, 8), stem=stem)
    assert run(model, images((2, 4, 10, 3))).shape == (2, 5)
    with pytest.raises(ValueError, match=f"stem='{stem}' cannot be streamed.*stem='linear'"):
        stream(model, images((1, 6, 8, 3)))
