"""A pyramid read strip by strip is the pyramid of the whole image, at any moment, whatever the height."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import images, relative_error, run
from tests.models.test_pyramid import abstract, lively
from vir_jax.inference import ImageStream, stream
from vir_jax.models import create_model

HEIGHT, WIDTH = 32, 16
WHOLE = images((2, HEIGHT, WIDTH, 3))


@pytest.fixture(scope="module")
def pyramid():
    return lively(image_size=(HEIGHT, WIDTH))


@pytest.fixture(scope="module")
def expected(pyramid):
    """Logits of the image cut off after each strip of 8 rows."""
    return {height: run(pyramid, WHOLE[:, :height]) for height in (8, HEIGHT)}


def test_a_stream_is_the_whole_image(pyramid, expected):
    assert relative_error(stream(pyramid, WHOLE), expected[HEIGHT]) < 1e-5


def test_a_stream_is_the_whole_image_with_another_stem_and_retention():
    """At a stride of 2 a row waits for whole strips after the first stage, too."""
    model = lively(image_size=64, stem_stride=2, retention="2d", gate=True)
    x = images((1, 64, 32, 3))
    assert relative_error(stream(model, x), run(model, x)) < 1e-5


def test_rows_as_they_arrive(pyramid, expected):
    """At any moment, in pieces of any number of rows, without knowing the height."""
    pixels = np.asarray(WHOLE)
    reader = ImageStream(pyramid, width=WIDTH, batch=2)
    empty = jax.tree.leaves(jax.tree.map(np.asarray, reader._state.layers))
    start = 0
    for rows in (3, 5, 8, 9, 7):
        reader.push(pixels[:, start : start + rows])
        start += rows
        if start == 16:
            # Two strips are on their way through the convolutions: no mixer has read any of them.
            jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(reader._state.layers), empty)
        if start in expected:
            assert relative_error(reader.predict(), expected[start]) < 1e-5, start
            # A prediction leaves the state as it is.
            assert relative_error(reader.predict(), expected[start]) < 1e-5, start
    assert start == HEIGHT


def test_what_is_kept_does_not_grow_with_the_height(pyramid):
    """Of nano at a stride of 1, lag by lag: rows of each convolution, one of waiting, and the last of the last one."""
    lines = pyramid.apart().initial_state(1, WIDTH).above
    by_width = {cols: sum(line.shape[1] for line in lines if line.shape[2] == cols) for cols in (16, 8, 4)}
    # The stem's two, two blocks of two, the halving one: 2 rows each, or 1. Then two blocks, a row that waits, halving.
    assert by_width == {16: 2 + 2 + 4 * 2 + 1, 8: 4 * 2 + 1 + 1, 4: 1}


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [("vir_h_ti", {}, 64), ("vir_h_s", {}, 96), ("vir_h_pico", {"stem_stride": 1}, 8)],
)
def test_the_delay_is_known(name, options, rows):
    """Of ti 71 rows below a token's first row are needed: those of its own strip and two more."""
    found = []

    def apart():
        model = create_model(name, num_classes=2, rngs=nnx.Rngs(0), **options).apart()
        found.append(model.delay(64))
        return model

    nnx.eval_shape(apart)
    assert found == [rows]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"flips": True}, "a pyramid made with flips=True cannot be streamed"),
        ({"late_attention": True}, "vir_h_nano with SoftmaxAttention among its mixers cannot be streamed"),
        (
            {"directions": 2},
            "vir_h_nano with retention with directions=2 among its mixers cannot be streamed",
        ),
        ({"mixer": "softmax"}, "vir_h_nano with SoftmaxAttention among its mixers cannot be streamed"),
    ],
)
def test_what_is_not_streamed_is_refused(options, reason):
    for method in ("apart", "check_streamable"):
        with pytest.raises(ValueError, match=reason):
            getattr(abstract(**options), method)()


def test_sides_are_whole_strips(pyramid):
    with pytest.raises(ValueError, match="20 x 16 pixels does not divide into patches of 8 x 8"):
        stream(pyramid, WHOLE[:, :20])
    with pytest.raises(ValueError, match="width is 20 pixels; expected a positive multiple of the patch, 8"):
        ImageStream(pyramid, width=20)
