"""Convolutional stems: linear as in Vision X-formers, or with norms; how far a token sees, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import images, lively, run
from vir_jax.inference import stream
from vir_jax.models.embedding import ConvEmbedding, Patchify, ViXEmbedding


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
    rows = {ViXEmbedding: (4, 10), ConvEmbedding: (1, 7)}[kind]  # The one looks around, the other up.
    assert sees(made(kind), 13, (7, 4)) == (rows, (1, 7))


@pytest.mark.parametrize(
    ("patch", "strides", "reach", "up"), [(2, (2, 1, 1), 5, 9), (4, (2, 2, 1), 7, 11), (16, (2,) * 4, 15, 15)]
)
def test_a_patch_halves_the_image_so_often(kind, patch, strides, reach, up):
    embedding = made(kind, patch)
    assert embedding.strides == strides
    assert embedding(images((1, 8 * patch, 2 * patch, 3))).shape == (1, 8, 2, 16)
    (first, last), _ = sees(embedding, 8 * patch, (5, 2))
    token = 5 * patch
    if kind is ViXEmbedding:
        assert (first, last) == (token - reach, token + reach)
    else:
        assert (first, last) == (token - up, token + patch - 1)


def test_channels_can_be_halved(kind):
    with pytest.raises(
        ValueError, match="doubles its channels 2 times, to 18 at last: expected a multiple of 4"
    ):
        made(kind, dim=18)


def test_a_model_that_sees_the_rows_below_is_not_streamed():
    model = lively("vir_pico2", image_size=(6, 8), stem="conv_vix")
    assert run(model, images((2, 4, 10, 3))).shape == (2, 5)
    with pytest.raises(ValueError, match=r"stem='conv_vix' cannot be streamed.*stem='linear' or 'conv'"):
        stream(model, images((1, 6, 8, 3)))


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_rows_read_in_pieces_are_those_of_the_whole_image(patch):
    embedding = made(ConvEmbedding, patch)
    x = images((2, 4 * patch, 3 * patch, 3))
    above, pieces = embedding.initial_state(2, 3 * patch), []
    for first, last in ((0, 1), (1, 3), (3, 4)):
        piece, above = embedding.read(x[:, first * patch : last * patch], above)
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), embedding(x), rtol=1e-6, atol=1e-6)


def test_patches_are_those_of_a_convolution():
    embedding = Patchify(3, 16, dtype=jnp.float32, rngs=nnx.Rngs(0))
    embedding.conv.bias[...] = images((16,))
    x = images((2, 6, 9, 3))
    np.testing.assert_allclose(embedding(x), embedding.conv(x), rtol=1e-5, atol=1e-6)
