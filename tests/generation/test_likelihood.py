"""Probabilities sum to one, over all images too, and are the same in every form of the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.generation.helpers import all_images, model_of, some_images
from vir_jax.generation import log_likelihood
from vir_jax.models import create_model
from vir_jax.models.likelihood import Categorical, Logistics, log_bin_mass, make_likelihood
from vir_jax.models.pixels import to_colours, to_levels

MODELS = {
    "one before": {},
    "neighbours": {"local_context": 1},
    "2-D": {"local_context": 1, "retention": "2d"},
    "no learned position": {"local_context": 2, "position": "sincos"},
    "softmax": {"mixer": "causal_softmax", "local_context": 1},
    "grey logistics": {"mixtures": 2, "local_context": 1},
}
RGB = {"channels": 3, "mixtures": 2, "local_context": 1}


# --- Distributions of a pixel ---


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_the_masses_of_a_logistic_sum_to_one(dtype, tolerance):
    means, log_scales = np.meshgrid([-1.3, 0.004, 0.9], np.arange(-9.0, 4))
    with jax.enable_x64(True):
        parameters = (jnp.asarray(values.ravel(), dtype) for values in (means, log_scales))
        masses = jnp.exp(log_bin_mass(jnp.arange(256), *parameters, 256))
        assert masses.dtype == dtype
        np.testing.assert_allclose(jnp.sum(masses, axis=0), 1, rtol=tolerance)


@pytest.mark.parametrize("log_scale", [-3.0, 0.0, 3.0])
def test_a_mass_is_the_integral_over_its_bin(log_scale):
    with jax.enable_x64(True):
        mean, scale = 0.3, np.exp(log_scale)
        edges = (2 * np.arange(1, 16) - 1) / 15 - 1
        below = 1 / (1 + np.exp(-(edges - mean) / scale))
        expected = np.diff(np.concatenate([[0], below, [1]]))
        found = jnp.exp(log_bin_mass(jnp.arange(16), jnp.array([mean]), jnp.array([log_scale]), 16))
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-10, atol=1e-16)


def test_a_far_tail_has_a_finite_gradient():
    def of(mean):
        return jnp.sum(log_bin_mass(jnp.array([0, 200, 255]), mean, jnp.array([-7.0]), 256))

    value, gradient = jax.value_and_grad(of)(jnp.array([-40.0]))
    assert value < -1e4
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize(
    "likelihood", [Categorical(5), Logistics(5, 1, 3), Logistics(3, 3, 2), Logistics(16, 1, 1)], ids=str
)
def test_the_probabilities_of_a_pixel_sum_to_one(likelihood):
    with jax.enable_x64(True):
        pixels = all_images(1, 1, likelihood.levels, likelihood.channels)[:, 0, 0]
        outputs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1, likelihood.num_outputs)))
        log_probabilities = likelihood.log_probability(outputs, jnp.asarray(pixels))
        np.testing.assert_allclose(jnp.sum(jnp.exp(log_probabilities), axis=1), 1, rtol=1e-12)


def test_channels_depend_on_those_before():
    likelihood = Logistics(8, 3, 2)
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=likelihood.num_outputs), jnp.float32)
    rest = [likelihood.log_probability(outputs, jnp.array([red, 3, 3])) for red in (0, 7)]
    red = [likelihood.log_probability(outputs.at[-6:].set(0), jnp.array([red, 3, 3])) for red in (0, 7)]
    assert rest[0] - rest[1] != red[0] - red[1]


def test_components_are_not_alike_at_first():
    likelihood = Logistics(256, 3, 5)

    def loss(outputs):
        return -likelihood.log_probability(outputs, jnp.array([10, 100, 200]))

    weights, *_ = jnp.split(jax.grad(loss)(jnp.zeros(likelihood.num_outputs)), [5])
    assert len(np.unique(weights)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 1, None), "levels=None; expected an integer from 2 to 256"),
        ((257, 1, None), "levels=257; expected"),
        ((17, 2, None), r"channels=2; expected 1 \(grey\) or 3 \(RGB\)"),
        ((17, 1, 0), "mixtures=0; expected 1 or more, or None"),
        ((256, 3, None), "channels=3 needs a mixture of logistics"),
    ],
)
def test_numbers_that_make_no_distribution(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_likelihood(*arguments)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_levels_and_colours(levels, channels):
    symbols = jnp.asarray(some_images(3, 4, 5, levels, channels))
    colours = to_colours(symbols, levels)
    np.testing.assert_array_equal(
        colours, np.broadcast_to(np.round(symbols * (255 / (levels - 1))), colours.shape)
    )
    np.testing.assert_array_equal(to_levels(colours, levels, channels), symbols)


# --- Images ---


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_probabilities_of_all_images_sum_to_one(options):
    """Of every image of a tiny alphabet; logits are float32, what is made of them float64."""
    check_sum(model_of(2, 2, 3, **options), jnp.asarray(all_images(2, 2, 3)))


def test_the_probabilities_of_all_larger_images_sum_to_one():
    check_sum(model_of(3, 3, 2, local_context=1), jnp.asarray(all_images(3, 3, 2)))


def test_the_probabilities_of_all_colour_images_sum_to_one():
    check_sum(model_of(1, 2, 4, **RGB), jnp.asarray(all_images(1, 2, 4, 3)))


def check_sum(model, images):
    b, *_, channels = images.shape
    graph, params = nnx.split(model)
    for mode in model.modes:
        outputs = jax.jit(lambda params, mode=mode: nnx.merge(graph, params)(images, mode=mode))(params)
        log_probabilities = model.stem.likelihood.log_probability(outputs, images.reshape(b, -1, channels))
        assert abs(float(jnp.sum(jnp.exp(jnp.sum(log_probabilities, axis=1)))) - 1) < 1e-5
        with jax.enable_x64(True):
            exact = model.stem.likelihood.log_probability(
                jnp.asarray(np.asarray(outputs, np.float64)), images.reshape(b, -1, channels)
            )
            assert exact.dtype == jnp.float64
            total = float(jnp.sum(jnp.exp(jnp.sum(exact, axis=1))))
        assert abs(total - 1) < 1e-10, mode


@pytest.mark.parametrize("options", [*MODELS.values(), RGB], ids=[*MODELS, "rgb"])
def test_every_form_gives_the_same_likelihood(options):
    channels = options.get("channels", 1)
    model = model_of(4, 5, 6, **options)
    images = jnp.asarray(some_images(3, 4, 5, 6, channels))
    expected = log_likelihood(model, images, model.modes[0])
    modes = [*model.modes[1:], "auto", *(["generation"] if options.get("retention") != "2d" else [])]
    for mode in modes:
        found = log_likelihood(model, images, mode)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-5, err_msg=mode)


def test_any_size_of_chunks_gives_the_same_likelihood():
    images = jnp.asarray(some_images(3, 4, 5, 6))
    expected = log_likelihood(model_of(4, 5, 6), images, "parallel")
    for chunk_size in (1, 7, 16):
        found = log_likelihood(model_of(4, 5, 6, chunk_size=chunk_size), images, "chunkwise")
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-5)


def test_every_form_has_the_same_gradient():
    model = model_of(4, 5, 6, local_context=1)
    images = jnp.asarray(some_images(3, 4, 5, 6))
    graph, params = nnx.split(model)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, mode):
        def loss(params):
            outputs = nnx.merge(graph, params)(images, mode=mode)
            return jnp.sum(model.stem.likelihood.log_probability(outputs, images.reshape(3, -1, 1)))

        return jax.grad(loss)(params)

    expected = jax.tree.leaves(gradient(params, "parallel"))
    for mode in ("recurrent", "chunkwise"):
        for found, wanted in zip(jax.tree.leaves(gradient(params, mode)), expected, strict=True):
            scale = float(jnp.abs(wanted).max())
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("options", [*MODELS.values(), RGB], ids=[*MODELS, "rgb"])
def test_no_pixel_is_predicted_from_itself_or_a_later_one(options):
    """Bit for bit; and from every earlier one that is within reach: all, but where 2-D decays leave some out."""
    channels = options.get("channels", 1)
    model, images = model_of(3, 4, 6, **options), some_images(1, 3, 4, 6, channels)
    graph, params = nnx.split(model)
    for mode in model.modes:
        outputs = jax.jit(lambda images, mode=mode: nnx.merge(graph, params)(images, mode=mode))
        before = np.asarray(outputs(images))
        for m in (0, 3, 5, 10):
            changed = images.copy().reshape(1, 12, channels)
            changed[:, m, -1] = (changed[:, m, -1] + 1) % 6
            after = np.asarray(outputs(changed.reshape(images.shape)))
            different = np.any(before != after, axis=(0, 2))
            assert not different[: m + 1].any(), (mode, m)
            assert different[m + 1], (mode, m)
            if options.get("retention") != "2d":
                assert different[m + 1 :].all(), (mode, m)


def test_the_first_prediction_says_nothing():
    model = create_model(
        "vir_pico1", num_classes=1, rngs=nnx.Rngs(0), stem="pixels", levels=17, image_size=4, layer_scale=None
    )
    bits = -log_likelihood(model, jnp.asarray(some_images(2, 4, 4, 17))) / np.log(2)
    np.testing.assert_allclose(bits, np.log2(17), rtol=3e-7)


def test_images_of_another_size():
    """Learned positions are resampled, in generation to the last bit as in training but for rounding."""
    model = model_of(3, 4, 5, local_context=1)
    images = jnp.asarray(some_images(2, 6, 5, 5))
    whole, one_by_one = (log_likelihood(model, images, mode) for mode in ("parallel", "generation"))
    np.testing.assert_allclose(one_by_one, whole, rtol=1e-5, atol=3e-5)


# --- What is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vir_pico2"}, r"patches of 2 x 2; expected a name that ends in 1, such as vir_pico1"),
        (
            {"name": "vit_pico1"},
            r"mixer='softmax': a token would see the pixel that it predicts.*'retention'",
        ),
        ({"bidirectional": True}, "bidirectional=True: a token would see the pixel that it predicts"),
        ({"flips": True}, "flips=True: a token would see the pixel that it predicts"),
        ({"readout": "average"}, "readout='average'; expected 'every_token' with stem='pixels'"),
        ({"local_context": -1}, "local_context=-1; expected a radius of 0 or more"),
        ({"stem": "pixel"}, "stem='pixel'; expected one of .*'pixels'"),
        ({"stem": "linear"}, "levels=3 is of models of pixels"),
    ],
)
def test_options_that_make_no_sense(options, message):
    given = {"name": "vir_pico1", "stem": "pixels", "levels": 3, "image_size": 4} | options
    with pytest.raises(ValueError, match=message):
        create_model(given.pop("name"), num_classes=1, rngs=nnx.Rngs(0), **given)


def test_what_has_no_likelihood():
    model, image = model_of(2, 2, 3), jnp.zeros((1, 2, 2, 1), jnp.int32)
    with pytest.raises(ValueError, match="an image has levels 0 to 3; expected 0 to 2, as the model knows 3"):
        log_likelihood(model, image.at[0, 0, 0, 0].set(3))
    with pytest.raises(ValueError, match=r"symbols have shape \(1, 2, 2, 3\); expected \[b, H, W, 1\]"):
        log_likelihood(model, jnp.zeros((1, 2, 2, 3), jnp.int32))
    with pytest.raises(ValueError, match="has no 'sideways' mode"):
        log_likelihood(model, image, "sideways")
    patches = create_model("vir_pico1", num_classes=2, rngs=nnx.Rngs(0), image_size=2)
    with pytest.raises(ValueError, match="the model predicts no pixels: its tokens are patches"):
        log_likelihood(patches, image)
