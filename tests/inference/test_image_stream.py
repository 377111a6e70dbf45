"""Rows of pixels in any number, predictions at any moment, a state that can be kept."""

import io

import jax
import numpy as np
import pytest
from flax import nnx

from tests.inference.test_recurrent import ROUNDING, model_of
from tests.models.helpers import images, relative_error, run
from tests.ops.cases import NEEDS
from vir_jax.inference import ImageStream, image_stream

IMAGE = (2, 12, 8, 3)  # 6 x 4 patches
MEAN, STD = (0.5,) * 3, (0.25,) * 3


def cut(rows, pieces):
    ends = np.cumsum(pieces)
    return np.split(rows, ends, axis=-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"readout": "average"},
        {"retention": "2d"},
        {"decays": "token", "head_norm": True, "short_conv": 4, "stem": "conv"},
    ],
    ids=str,
)
@pytest.mark.parametrize("pieces", [(12,), (1,) * 11, (3, 0, 5, 1)], ids=str)
def test_rows_may_come_in_any_number(options, pieces):
    model, x = model_of(**options), np.asarray(images(IMAGE))
    stream = ImageStream(model, width=8, height=12, batch=2)
    for rows in cut(x, pieces):
        stream.push(rows)
    assert (stream.received, stream.read) == (12, 12)
    assert relative_error(stream.predict(), run(model, x, mode="parallel")) < ROUNDING


@pytest.mark.parametrize("implementation", [pytest.param("cpp_cpu", marks=NEEDS["cpu"])])
@pytest.mark.parametrize("retention", ["1d", "2d"])
def test_a_kernel_reads_rows_as_they_come(retention, implementation):
    x = np.asarray(images(IMAGE))
    stream = ImageStream(
        model_of(retention=retention, implementation=implementation), width=8, height=12, batch=2
    )
    for rows in cut(x, (3, 0, 5, 4)):
        stream.push(rows)
    assert relative_error(stream.predict(), run(model_of(retention=retention), x, mode="parallel")) < ROUNDING


@pytest.mark.parametrize("retention", ["1d", "2d"])
def test_prediction_at_any_moment_is_that_of_the_image_so_far_and_disturbs_nothing(retention):
    """With sine-cosine position embeddings the height need not be known, and every prefix is an image of its own."""
    model, x = model_of(retention=retention, position="sincos"), np.asarray(images(IMAGE))
    asked, silent = (ImageStream(model, width=8, batch=2) for _ in range(2))
    for row in range(12):
        for stream in (asked, silent):
            stream.push(x[:, row : row + 1])
        if row >= 1:
            read = (row + 1) // 2 * 2
            assert asked.read == read
            if row % 4 == 1:  # The parallel mode compiles anew for each height.
                assert relative_error(asked.predict(), run(model, x[:, :read], mode="parallel")) < ROUNDING
            asked.predict()
    np.testing.assert_array_equal(asked.predict(), silent.predict())


def test_batched_streams_are_independent():
    model, x = model_of(), np.asarray(images(IMAGE))
    together = ImageStream(model, width=8, height=12, batch=2)
    together.push(x)
    for i in range(2):
        alone = ImageStream(model, width=8, height=12)
        alone.push(x[i])
        assert relative_error(alone.predict()[0], together.predict()[i]) < ROUNDING


@pytest.mark.parametrize("retention", ["1d", "2d"])
def test_rows_that_come_together_are_read_together(retention):
    """As many as make a chunk; those that are left over, and those that come alone, row after row of patches."""
    model, x = model_of(retention=retention), np.asarray(images(IMAGE))
    stream, read = ImageStream(model, width=8, height=12, batch=2, chunk_size=8), []
    stream._chunk, whole = 4, stream._read  # Two rows of patches; in 2-D they would be 8.

    def count(variables, state, pixels, rows):
        read.append(pixels.shape[1])
        return whole(variables, state, pixels, rows)

    stream._read = count
    for rows in cut(x, (1, 10)):
        stream.push(rows)
    assert read == [2, 4, 4, 2]
    assert relative_error(stream.predict(), run(model, x, mode="parallel")) < ROUNDING


def test_pushed_rows_may_be_overwritten_afterwards():
    """Line scanners fill one buffer again and again."""
    model, x = model_of(), np.asarray(images(IMAGE))
    stream = ImageStream(model, width=8, height=12, batch=2)
    buffer = np.empty_like(x[:, :2])
    for row in range(0, 12, 2):
        buffer[:] = x[:, row : row + 2]
        stream.push(buffer)
        buffer[:] = np.nan
    assert relative_error(stream.predict(), run(model, x, mode="parallel")) < ROUNDING


def test_one_compilation_for_all_rows_and_all_heights():
    model = model_of()
    compiled = []

    def count(event, duration, **_):
        compiled.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    first = ImageStream(model, width=8, height=12, normalization=(MEAN, STD))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 3), dtype=np.uint8)
    first.push(pixels[:2])
    first.predict()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for row in range(2, 12):
            first.push(pixels[row : row + 1])
            first.predict()
        taller = ImageStream(model, width=8, height=40, normalization=(MEAN, STD))
        for rows in cut(pixels, (5, 17)):
            taller.push(rows)
        taller.predict()
        assert compiled == []
        other = ImageStream(model, width=10, height=12, normalization=(MEAN, STD))
        other.push(np.zeros((2, 10, 3), np.uint8))
        assert compiled, "the counter counts"
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize("options", [{"readout": "average"}, {"retention": "2d"}, {"stem": "conv"}], ids=str)
def test_saved_state_goes_on_bit_for_bit(tmp_path, options):
    model, x = model_of(**options), np.asarray(images(IMAGE))
    whole, before, after = (ImageStream(model, width=8, height=12, batch=2) for _ in range(3))
    whole.push(x)
    before.push(x[:, :5])  # Two rows of patches, and a row of pixels that waits for its neighbour.
    before.save(tmp_path / "state.npz")
    before.push(x[:, 5:7])
    after.restore(tmp_path / "state.npz")
    assert (after.received, after.read) == (5, 4)
    after.push(x[:, 5:])
    np.testing.assert_array_equal(after.predict(), whole.predict())
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


def test_state_of_another_stream_is_refused(tmp_path):
    model = model_of()
    stream = ImageStream(model, width=8, height=12)
    stream.save(tmp_path / "state.npz")
    with pytest.raises(ValueError, match="width is 8, of this stream it is 10"):
        ImageStream(model, width=10, height=12).restore(tmp_path / "state.npz")
    with pytest.raises(ValueError, match="height is 12, of this stream it is 14"):
        ImageStream(model, width=8, height=14).restore(tmp_path / "state.npz")
    model.readout.head.bias[...] = model.readout.head.bias[...] + 1
    with pytest.raises(ValueError, match="checksum_of_weights is"):
        ImageStream(model, width=8, height=12).restore(tmp_path / "state.npz")


@pytest.mark.parametrize(
    ("options", "other", "what"),
    [
        ({}, {"readout": "average"}, "model"),
        ({"retention": "1d"}, {"retention": "2d"}, "model"),
        ({}, {"dtype": "bfloat16"}, "model"),
        ({}, {"normalization": (MEAN, STD)}, "normalization"),
    ],
    ids=str,
)
def test_state_of_another_model_with_the_same_weights_is_refused(tmp_path, options, other, what):
    def stream(normalization=None, **options):
        return ImageStream(model_of(**options), width=8, height=12, normalization=normalization)

    stream(**options).save(tmp_path / "state.npz")
    with pytest.raises(ValueError, match=f"{what} is .*, of this stream it is "):
        stream(**options | other).restore(tmp_path / "state.npz")


def test_a_file_that_is_no_state_is_refused_and_the_stream_left_alone(tmp_path):
    stream, path = ImageStream(model_of(), width=8, height=12), tmp_path / "state.npz"
    stream.push(np.zeros((2, 8, 3), np.float32))
    before = np.asarray(stream.predict())
    stream.save(path)
    whole = path.read_bytes()
    pickled, arrays, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(pickled, np.array({}, object), allow_pickle=True)
    np.savez(arrays, other=np.zeros(3))
    np.save(array, np.zeros(3))
    for content in (b"", b"text", whole[:-100], pickled.getvalue(), arrays.getvalue(), array.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"no state that ImageStream\.save wrote") as error:
            stream.restore(path)
        assert "pickle" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        stream.restore(tmp_path / "absent.npz")
    np.testing.assert_array_equal(stream.predict(), before)


def test_reading_a_row_copies_no_weights():
    """What the compiled program holds besides its arguments, beside the weights it reads."""
    model = model_of()
    stream = ImageStream(model, width=8, height=12)
    arguments = (stream._variables, stream._state, stream._strip, stream._rows)
    compiled = image_stream._read.lower(stream._graph, 512, None, *arguments).compile()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(stream._variables))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * weights


def test_amid_an_image_patches_carry_their_positions_in_the_whole_of_it():
    model, x = model_of(), np.asarray(images(IMAGE))
    stream = ImageStream(model, width=8, height=12, batch=2)
    stream.push(x[:, :6])
    cut_off = model_of()
    cut_off.stem.position.embedding = nnx.Param(model.stem.position.of_grid((6, 4))[:, :3])
    assert relative_error(stream.predict(), run(cut_off, x[:, :6])) < ROUNDING
    assert relative_error(stream.predict(), run(model, x[:, :6])) > 1e-3  # Stretched over these rows alone.


def test_errors():
    model = model_of()
    with pytest.raises(ValueError, match="width is 9 pixels; expected a positive multiple of the patch, 2"):
        ImageStream(model, width=9, height=12)
    with pytest.raises(ValueError, match="height is 0 pixels"):
        ImageStream(model, width=8, height=0)
    with pytest.raises(ValueError, match="give its height, or use a model made with position='sincos'"):
        ImageStream(model, width=8)
    with pytest.raises(ValueError, match="bidirectional"):
        ImageStream(model_of(bidirectional=True), width=8, height=12)
    stream = ImageStream(model, width=8, height=12)
    stream.push(np.zeros((1, 8, 3), np.float32))
    with pytest.raises(
        ValueError, match="1 rows of pixels have arrived; a prediction needs a row of patches, 2"
    ):
        stream.predict()
    with pytest.raises(ValueError, match=r"\(2, 9, 3\); expected \[1, any, 8, 3\]"):
        stream.push(np.zeros((2, 9, 3), np.float32))
    with pytest.raises(ValueError, match="rows are uint8; expected float32"):
        stream.push(np.zeros((2, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="12 rows after 1 are more than the 12 of the image"):
        stream.push(np.zeros((12, 8, 3), np.float32))
    assert stream.received == 1
