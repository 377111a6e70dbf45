"""Logits of pixels row by row as an image arrives: those of the whole image, and nothing that grows with its height."""

import jax
import numpy as np
import pytest

from tests.inference.test_recurrent import ROUNDING, model_of
from tests.models.helpers import images, relative_error, run
from vir_jax.inference import ImageStream, stream
from vir_jax.inference.recurrent import check_classifies_images

IMAGE = (2, 12, 8, 3)  # 6 x 4 patches


def cut(x, pieces):
    return np.split(x, np.cumsum(pieces), axis=1)


@pytest.mark.parametrize(
    ("options", "chunk_size"),
    [({}, 3), ({"retention": "2d", "position": "sincos", "stem": "conv"}, 512)],
    ids=str,
)
def test_rows_are_those_of_the_whole_image(options, chunk_size):
    model, x = model_of(readout="dense_patch", **options), np.asarray(images(IMAGE))
    whole = run(model, x, mode="parallel")
    height = None if options.get("position") else 12
    rows = ImageStream(model, width=8, height=height, batch=2, chunk_size=chunk_size)
    # Of five rows of pixels two rows of patches are read, and so on.
    given = [rows.push(piece) for piece in cut(x, (5, 0, 1, 4))]
    assert [(part.shape[1], part.dtype) for part in given] == [(n, np.float32) for n in (4, 0, 2, 4, 2)]
    assert relative_error(np.concatenate(given, axis=1), whole) < ROUNDING


def test_what_is_kept_does_not_grow_with_the_height():
    model = model_of(readout="dense_patch")

    def kept(height):
        rows = ImageStream(model, width=8, height=height)
        rows.push(np.zeros((height - 2, 8, 3), np.float32))
        last = rows.push(np.zeros((2, 8, 3), np.float32))
        assert last.shape == (1, 2, 8, 5)
        return [leaf.nbytes for leaf in jax.tree.leaves(rows._state)], rows._strip.nbytes

    assert kept(12) == kept(40)


def test_a_dense_stream_goes_on_from_a_saved_state(tmp_path):
    model, x = model_of(readout="dense_patch"), np.asarray(images(IMAGE))
    whole, before, after = (ImageStream(model, width=8, height=12, batch=2) for _ in range(3))
    expected = whole.push(x)
    before.push(x[:, :5])
    before.save(tmp_path / "state.npz")
    after.restore(tmp_path / "state.npz")
    np.testing.assert_array_equal(after.push(x[:, 5:]), expected[:, 4:])


def test_what_says_nothing_of_an_image_is_refused():
    model, x = model_of(readout="dense_patch"), images(IMAGE)
    with pytest.raises(ValueError, match="readout='dense_patch' gives logits to each pixel and none to an"):
        stream(model, x)
    rows = ImageStream(model, width=8, height=12, batch=2)
    rows.push(np.asarray(x))
    with pytest.raises(ValueError, match="gives logits to each pixel and none to an image"):
        rows.predict()
    plain = model_of()
    check_classifies_images(plain)
    assert ImageStream(plain, width=8, height=12, batch=2).push(np.asarray(x)) is None
    with pytest.raises(ValueError, match="readout='dense_linear' cannot be streamed"):
        ImageStream(model_of(readout="dense_linear"), width=8, height=12)
