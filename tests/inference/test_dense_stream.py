"""Logits of pixels row by row as an image arrives: those of the whole image, and nothing that grows with its height."""

import jax
import numpy as np
import pytest

from tests.inference.test_recurrent import ROUNDING, model_of
from tests.models.helpers import images, lively, relative_error, run
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


@pytest.mark.parametrize("readout", ["dense_patch", "dense_linear"])
def test_what_is_kept_does_not_grow_with_the_height(readout):
    model = model_of(readout=readout)

    def kept(height):
        rows = ImageStream(model, width=8, height=height)
        rows.push(np.zeros((height - 2, 8, 3), np.float32))
        last = rows.push(np.zeros((2, 8, 3), np.float32))
        assert last.shape == (1, 2 + model.readout.waiting, 8, 5)
        return [leaf.nbytes for leaf in jax.tree.leaves(rows._state)], rows._strip.nbytes

    assert kept(12) == kept(40)


@pytest.mark.parametrize("readout", ["dense_patch", "dense_linear"])
def test_a_dense_stream_goes_on_from_a_saved_state(tmp_path, readout):
    model, x = model_of(readout=readout), np.asarray(images(IMAGE))
    whole, before, after = (ImageStream(model, width=8, height=12, batch=2) for _ in range(3))
    expected = whole.push(x)
    given = before.push(x[:, :5])
    before.save(tmp_path / "state.npz")
    after.restore(tmp_path / "state.npz")
    np.testing.assert_array_equal(after.push(x[:, 5:]), expected[:, given.shape[1] :])


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
    with pytest.raises(ValueError, match="gives logits to the image, and none to its pixels; use `predict`"):
        ImageStream(plain, width=8, height=12).pending()


# ---------------------------------------------------------------------------- between rows of patches


@pytest.mark.parametrize(
    ("name", "pieces"), [("vir_pico3", (7, 0, 2, 9)), ("vir_pico4", (1, 19, 4)), ("vir_pico1", (2, 3))]
)
def test_interpolated_rows_are_those_of_the_whole_image(name, pieces):
    """However they arrive, one by one or several together: half a patch later, and the last with the image's end."""
    patch, height = int(name[-1]), sum(pieces)
    model = lively(name, readout="dense_linear", position="sincos", image_size=(2 * patch, 2 * patch))
    x = np.asarray(images((1, height, 3 * patch, 3)))
    whole = run(model, x, mode="parallel")
    known = ImageStream(model, width=3 * patch, height=height, chunk_size=6)
    given = [known.push(piece) for piece in cut(x, pieces[:-1])]
    wait, seen = patch // 2, np.cumsum(pieces) // patch * patch
    assert np.cumsum([part.shape[1] for part in given]).tolist() == [
        max(n - wait, 0) if n < height else height for n in seen
    ]
    assert relative_error(np.concatenate(given, axis=1), whole) < ROUNDING
    assert known.pending().shape[1] == 0


def test_an_image_of_unknown_height_ends_when_it_is_said():
    """Wherever it does: what waits is as in the image cut off there."""
    model, x = model_of(readout="dense_linear", position="sincos"), np.asarray(images((1, 12, 8, 3)))
    rows = ImageStream(model, width=8)
    assert rows.pending().shape == (1, 0, 8, 5)
    # A row of patches and a row of pixels; then the rest.
    first, ended = rows.push(x[:, :3]), rows.pending()
    cut_off = run(model, x[:, :2], mode="parallel")
    assert relative_error(np.concatenate([first, ended], axis=1), cut_off) < ROUNDING
    given = [first, rows.push(x[:, 3:]), rows.pending()]
    assert relative_error(np.concatenate(given, axis=1), run(model, x, mode="parallel")) < ROUNDING
