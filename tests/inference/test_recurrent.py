"""Recurrent inference equals the parallel mode: every model that can be streamed, every way to cut an image up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import abstract, images, lively, relative_error, run
from vir_jax.inference import stream
from vir_jax.inference.recurrent import initial_state, read_rows
from vir_jax.models.pixels import normalize

IMAGE = (2, 10, 14, 3)  # 5 x 7 patches; the model's own grid is 3 x 4.
MODELS = [
    {"readout": "class_token"},
    {"readout": "average"},
    {"readout": "class_token", "retention": "2d"},
    {"readout": "average", "retention": "2d", "position": "sincos"},
    {"decays": "token", "qk_norm": "rms", "head_norm": True, "gate": True, "short_conv": 4},
    {"decays": "learned", "qk_norm": "layer", "head_norm": True, "short_conv": 3, "retention": "2d"},
    {"stem": "conv"},
]
# These models have random weights of 0.2, which amplify the rounding of float32; 2e-5 is what the modes are held to
# against float64 (tests/models).
ROUNDING = 1e-5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def label(options):
    return "-".join(map(str, options.values()))


def model_of(**options):
    """Two blocks suffice for layers that follow one another, and compile in half the time."""
    model = lively("vir_pico2", image_size=(6, 8), **options)
    stage = model.stage
    graph, params = nnx.split(stage.blocks)
    stage.blocks = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[:2], params))
    stage.depth, stage.drop_path_rates = 2, stage.drop_path_rates[:2]
    return model


@pytest.mark.parametrize("options", MODELS, ids=label)
def test_streamed_logits_equal_the_parallel_ones(options):
    model, x = model_of(**options), images(IMAGE)
    expected = run(model, x, mode="parallel")
    logits = stream(
        model, x, chunk_size=16
    )  # Of 35 patches, which it does not divide; in 2-D two rows of five.
    assert logits.dtype == jnp.float32
    assert relative_error(logits, expected) < ROUNDING


@pytest.mark.parametrize(
    ("options", "chunk_size"),
    [
        ({}, 1),
        ({}, 7),
        ({}, 1000),
        ({"retention": "2d"}, 1),
        ({"decays": "token", "short_conv": 4}, 2),
        ({"stem": "conv"}, 1),
    ],
)
def test_any_chunk_size(options, chunk_size):
    model, x = model_of(**options), images(IMAGE)
    logits = stream(model, x, chunk_size=chunk_size)
    assert relative_error(logits, run(model, x, mode="parallel")) < ROUNDING


@pytest.mark.parametrize(
    ("options", "shape"), [({}, (1, 2, 2, 3)), ({}, (1, 2, 24, 3)), ({"retention": "2d"}, (1, 24, 2, 3))]
)
def test_images_of_any_shape(options, shape):
    model, x = model_of(**options), images(shape)
    assert relative_error(stream(model, x, chunk_size=6), run(model, x, mode="parallel")) < ROUNDING


def test_large_enough_an_image_for_the_chunkwise_forms():
    """1,024 patches in chunks of 200: the operator takes its chunkwise form inside a chunk, too."""
    model, x = model_of(), images((1, 64, 64, 3))
    assert relative_error(stream(model, x, chunk_size=200), run(model, x, mode="parallel")) < ROUNDING


def test_bfloat16_models():
    model, x = model_of(dtype=jnp.bfloat16), images(IMAGE)
    assert relative_error(stream(model, x, chunk_size=5), run(model, x, mode="parallel")) < 2e-2


def test_uint8_images_are_normalised_as_in_training():
    model = model_of()
    pixels = np.random.default_rng(3).integers(0, 256, IMAGE, dtype=np.uint8)
    expected = run(model, normalize(jnp.asarray(pixels), MEAN, STD), mode="parallel")
    assert relative_error(stream(model, pixels, normalization=(MEAN, STD)), expected) < ROUNDING


def test_memory_depends_on_the_chunk_and_not_on_the_image():
    """The compiled program's temporary memory, beside what the whole image takes at once."""

    def temporary_bytes(function, side):
        graph, params = nnx.split(abstract("vir_pico4", image_size=(32, 32)))
        pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        compiled = jax.jit(lambda params, x: function(nnx.merge(graph, params), x)).lower(params, pixels)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    def streamed(model, x):
        return stream(model, x, chunk_size=64)

    small, large = temporary_bytes(streamed, 128), temporary_bytes(streamed, 1024)
    assert large < 1.1 * small
    assert temporary_bytes(lambda model, x: model(x, mode="chunkwise"), 1024) > 50 * large


def test_errors():
    x = images(IMAGE)
    with pytest.raises(ValueError, match=r"SoftmaxAttention cannot be streamed.*vir_\*"):
        stream(lively("vit_pico2", image_size=(6, 8)), x)
    with pytest.raises(ValueError, match=r"bidirectional model cannot be streamed.*bidirectional=False"):
        stream(model_of(bidirectional=True), x)
    with pytest.raises(ValueError, match=r"flips=True cannot be streamed"):
        stream(model_of(flips=True), x)
    model = model_of()
    with pytest.raises(ValueError, match="10 x 15 pixels does not divide into patches of 2 x 2"):
        stream(model, images((1, 10, 15, 3)))
    with pytest.raises(ValueError, match="chunk_size is 0; expected at least 1"):
        stream(model, x, chunk_size=0)
    with pytest.raises(ValueError, match="pixels are uint8; expected floating point"):
        stream(model, jnp.zeros(IMAGE, jnp.uint8))
    with pytest.raises(ValueError, match="pixels are float32; expected uint8"):
        stream(model, x, normalization=(MEAN, STD))
    apart = model.apart()
    with pytest.raises(ValueError, match="height must be known"):
        read_rows(apart, initial_state(apart, 2, 14), x, rows=None)
