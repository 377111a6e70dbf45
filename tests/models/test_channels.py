"""Models of grey images, and of four channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vir_jax.inference import ImageStream, stream
from vir_jax.models import create_model
from vir_jax.models.pixels import normalize
from vir_jax.runs.config import default_config
from vir_jax.runs.load import load_run
from vir_jax.runs.validate import validate
from vir_jax.training.loop import train


def make(**options):
    """A model whose parameters all matter, which is not so of a fresh one."""
    model = create_model(
        "vir_pico2", num_classes=5, rngs=nnx.Rngs(0), image_size=8, layer_scale=0.5, **options
    )
    graph, variables = nnx.split(model)
    draw = np.random.default_rng(0).standard_normal
    return nnx.merge(graph, jax.tree.map(lambda x: x + 0.1 * jnp.asarray(draw(x.shape), x.dtype), variables))


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_reads_as_many_channels_as_it_was_made_for(stem, channels):
    model = make(stem=stem, channels=channels)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, channels))
    logits = model(images)
    assert logits.shape == (2, 5)
    for channel in range(channels):
        assert not np.allclose(model(images.at[..., channel].multiply(2.0)), logits, rtol=1e-2)
    kind = {1: "grey", 4: "RGBA"}[channels]
    with pytest.raises(ValueError, match=rf"expected \[b, H, W, {channels}\], a batch of {kind} images"):
        model(jnp.zeros((2, 8, 8, 3)))
    same = create_model(**model.options, num_classes=5, rngs=nnx.Rngs(0), image_size=8)
    assert same.channels == model.channels == channels


def test_three_channels_are_the_same_model_as_before():
    assert make(channels=3).options == make().options
    for channels in (0, 2, True):
        with pytest.raises(ValueError, match=r"channels=.*; expected one of \(1, 3, 4\)"):
            make(channels=channels)


@pytest.mark.parametrize("channels", [1, 4])
def test_streams(channels):
    model = make(channels=channels)
    images = np.asarray(jax.random.normal(jax.random.key(0), (1, 8, 12, channels)))
    expected = model(jnp.asarray(images))
    np.testing.assert_allclose(stream(model, images), expected, rtol=1e-4, atol=1e-5)
    rows = ImageStream(model, width=12, height=8)
    rows.push(images)
    np.testing.assert_allclose(rows.predict(), expected, rtol=1e-4, atol=1e-5)


def test_grey_models_take_the_average_of_rgb():
    model = make(channels=1)
    pixels = np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3), np.uint8)
    normalization = (0.5,), (0.25,)
    grey = (pixels.mean(axis=-1, keepdims=True) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(normalize(jnp.asarray(pixels), *normalization), grey, rtol=1e-5, atol=1e-6)
    expected = model(jnp.asarray(grey, jnp.float32))
    np.testing.assert_allclose(
        stream(model, pixels, normalization=normalization), expected, rtol=1e-4, atol=1e-5
    )
    rows = ImageStream(model, width=8, height=8, normalization=normalization)
    rows.push(pixels)
    np.testing.assert_allclose(rows.predict(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="images have 3 colours and the normalisation is of 4"):
        normalize(jnp.asarray(pixels), (0.5,) * 4, (0.5,) * 4)


def test_a_run_of_a_grey_model(digits_config, two_devices, tmp_path):
    config = digits_config
    config.model.channels, config.data.mean, config.data.std = 1, (0.5,), (0.5,)
    config.epochs = 0.3
    train(config, tmp_path)
    assert load_run(tmp_path).params["stem"]["embedding"]["conv"]["kernel"].shape == (4, 4, 1, 64)


@pytest.mark.parametrize(
    ("channels", "mean", "message"),
    [
        (1, (0.5, 0.5, 0.5), r"config\.data\.mean is \(0\.5, 0\.5, 0\.5\); expected 1 value"),
        (None, (0.5,), r"config\.data\.mean is \(0\.5,\); expected 3 value"),
        (4, (0.5, 0.5, 0.5), r"config\.model\.channels is 4; expected 1 or 3: images are read as RGB"),
    ],
)
def test_what_is_not_read_is_refused(channels, mean, message):
    config = default_config()
    config.model.channels, config.data.mean = channels, mean
    with pytest.raises(ValueError, match=message):
        validate(config)
