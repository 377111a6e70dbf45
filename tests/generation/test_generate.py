"""What is drawn follows the model's own distribution, and depends on nothing but the key and the image's number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from tests.generation.helpers import all_images, model_of, some_images
from vir_jax.generation import Sampling, generate, log_likelihood
from vir_jax.generation.generate import _draw, advance, read_prompt
from vir_jax.generation.pieces import initial_state
from vir_jax.generation.sampling import image_keys
from vir_jax.models import create_model

KEY = jax.random.key(3)
MODELS = {
    "grey": {"local_context": 1},
    "rgb": {"channels": 3, "mixtures": 2, "local_context": 1},
    "softmax": {"mixer": "causal_softmax"},
}


def model(kind="grey"):
    return model_of(4, 5, 6, **MODELS[kind])


# --- The distribution ---


def test_samples_follow_the_exact_probabilities():
    """20,000 draws against all 27 images: chi-square."""
    tiny, images = model_of(1, 3, 3, local_context=1), all_images(1, 3, 3)
    expected = np.exp(np.sum(np.asarray(log_likelihood(tiny, jnp.asarray(images)), np.float64), axis=(1, 2)))
    drawn, _ = generate(tiny, KEY, 20_000)
    check_counts(np.asarray(drawn).reshape(-1, 3) @ (9, 3, 1), expected)


@pytest.mark.parametrize("top_k", [None, 3])
def test_samples_of_logistics_follow_the_exact_probabilities(top_k):
    """The channels of one RGB pixel, each given those before: from a component, or from the masses of all levels."""
    tiny, images = model_of(1, 1, 3, channels=3, mixtures=2), all_images(1, 1, 3, 3)
    expected = np.exp(np.asarray(log_likelihood(tiny, jnp.asarray(images)), np.float64)).ravel()
    drawn, _ = generate(tiny, KEY, 20_000, top_k=top_k)
    check_counts(np.asarray(drawn).reshape(-1, 3) @ (9, 3, 1), expected)


def test_a_temperature_is_that_of_each_pixel():
    tiny = model_of(1, 1, 5)
    log_masses = np.asarray(log_likelihood(tiny, jnp.arange(5).reshape(5, 1, 1, 1)), np.float64).ravel()
    for options, expected in (
        ({"temperature": 2.0}, np.exp(log_masses / 2)),
        ({"top_k": 3}, np.where(np.argsort(np.argsort(-log_masses)) < 3, np.exp(log_masses), 0)),
    ):
        drawn, found = generate(tiny, KEY, 20_000, **options)
        check_counts(np.asarray(drawn).ravel(), expected / expected.sum())
        np.testing.assert_allclose(
            np.asarray(found).ravel(), log_masses[np.asarray(drawn).ravel()], rtol=1e-5
        )


def check_counts(numbers, probabilities):
    counts = np.bincount(numbers, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    likely = probabilities * counts.sum() >= 5  # What chi-square needs; the rest is one class.
    grouped = [
        np.append(values[likely], values[~likely].sum()) for values in (counts, probabilities * counts.sum())
    ]
    if grouped[1][-1] < 5:
        grouped = [np.append(values[:-2], values[-2:].sum()) for values in grouped]
    statistic = np.sum((grouped[0] - grouped[1]) ** 2 / grouped[1])
    assert len(grouped[0]) > 2
    assert stats.chi2.sf(statistic, len(grouped[0]) - 1) > 1e-3


def test_the_most_probable_symbols():
    log_masses = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]))
    for sampling, kept in (
        (Sampling(top_k=1), [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (Sampling(top_k=2), [[0, 1, 1, 0], [1, 1, 0, 0]]),
        (Sampling(top_p=0.3), [[0, 1, 0, 0], [1, 1, 0, 0]]),
        (Sampling(top_p=0.69), [[0, 1, 1, 0], [1, 1, 1, 0]]),
        (Sampling(top_k=3, top_p=0.8), [[0, 1, 1, 1], [1, 1, 1, 0]]),
        (Sampling(top_k=4, top_p=1.0), np.ones((2, 4))),
    ):
        restricted = sampling.restrict(log_masses)
        np.testing.assert_array_equal(jnp.isfinite(restricted), np.array(kept, bool), err_msg=str(sampling))


def test_limits_of_the_options():
    plain, coldest, best, all_levels = (
        generate(model(), KEY, 4, **options)[0]
        for options in ({}, {"temperature": 1e-6}, {"top_k": 1}, {"top_k": 6, "top_p": 1.0})
    )
    np.testing.assert_array_equal(coldest, best)
    np.testing.assert_array_equal(all_levels, plain)
    assert np.any(best != plain)
    np.testing.assert_array_equal(best[1:], best[:-1])


# --- One likelihood ---


@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_are_those_of_evaluation(kind):
    images, found = generate(model(kind), KEY, 3, temperature=1.5)
    expected = log_likelihood(model(kind), images, "parallel")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-5)


# --- What an image depends on ---


@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_is_kept_and_how_it_is_read_does_not_matter(kind):
    given = some_images(1, 4, 5, 6, 3 if kind == "rgb" else 1)
    channels = given.shape[-1]
    options = {"temperature": 2.0}  # The model is sure of most pixels.
    expected, scores = generate(model(kind), KEY, 3, prompt=given[:, :2], **options)
    np.testing.assert_array_equal(expected[:, :2], np.broadcast_to(given[:, :2], (3, 2, 5, channels)))
    assert np.any(expected[0] != expected[1])
    for prompt, chunk_size in (
        (given[:, :2], 1),
        (given[:, :2], 7),
        (given.reshape(1, 20, channels)[:, :10], 4),
        (np.repeat(given[:, :2], 3, axis=0), 512),
    ):
        found, found_scores = generate(model(kind), KEY, 3, prompt=prompt, chunk_size=chunk_size, **options)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(found_scores, scores, rtol=1e-5, atol=5e-5)
    np.testing.assert_allclose(scores, log_likelihood(model(kind), expected), rtol=1e-5, atol=5e-5)


def test_completions_go_on_as_the_image_would():
    """The same key and number draw the same pixels, whether those above were drawn or given."""
    image, _ = generate(model(), KEY, 1)
    for pixels in (3, 19, 20):
        completed, _ = generate(model(), KEY, 1, prompt=image.reshape(1, 20, 1)[:, :pixels])
        np.testing.assert_array_equal(completed, image)


def test_eight_at_once_are_eight_alone():
    together, scores = generate(model(), KEY, 8)
    alone = [generate(model(), KEY, 1, first=number) for number in range(8)]
    np.testing.assert_array_equal(together, np.concatenate([images for images, _ in alone]))
    np.testing.assert_allclose(scores, np.concatenate([found for _, found in alone]), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_resumed_is_uninterrupted_bit_for_bit(kind):
    """The state and what was drawn so far, as NumPy arrays, are all that must be kept."""
    size, sampling = (4, 5), Sampling()
    nothing = np.zeros((2, 0, 3 if kind == "rgb" else 1), np.int32)

    def start():
        state, _ = read_prompt(model(kind), nothing, size)
        return state

    _, expected, expected_scores = advance(model(kind), start(), KEY, 20, sampling, image_size=size)
    state, found, scores = advance(model(kind), start(), KEY, 9, sampling, image_size=size)
    stored = jax.tree.map(np.array, state)
    del state
    state = jax.tree.map(jnp.asarray, stored)
    _, rest, rest_scores = advance(model(kind), state, KEY, 11, sampling, image_size=size)
    np.testing.assert_array_equal(np.concatenate([found, rest], axis=1), expected)
    np.testing.assert_array_equal(np.concatenate([scores, rest_scores], axis=1), expected_scores)


def test_progress_is_told_row_by_row_and_changes_nothing():
    expected, _ = generate(model(), KEY, 2)
    rows = []
    found, _ = generate(model(), KEY, 2, progress=rows.append)
    assert rows == [1, 2, 3, 4]
    np.testing.assert_array_equal(found, expected)
    rows.clear()
    generate(model(), KEY, 2, prompt=np.asarray(expected)[:1].reshape(1, 20, 1)[:, :7], progress=rows.append)
    assert rows == [2, 3, 4]


# --- Memory ---


def temporary_bytes(model, height):
    """What the compiled loop needs besides arguments and what is drawn, two images of `height` x 8."""
    graph, variables = nnx.split(model.apart())
    size, sampling, steps = (height, 8), Sampling(), height * 8
    state = jax.eval_shape(lambda variables: initial_state(nnx.merge(graph, variables), 2, size), variables)
    keys = jax.eval_shape(lambda: image_keys(KEY, 0, 2))
    analysis = _draw.lower(graph, size, steps, sampling, variables, state, keys).compile().memory_analysis()
    drawn = steps * 2 * (4 + 4)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return analysis.temp_size_in_bytes, state_bytes, drawn


def test_memory_does_not_grow_with_the_image():
    options = {"position": "sincos", "local_context": 2}
    (small, small_state, drawn), (large, large_state, more_drawn) = (
        temporary_bytes(model_of(8, 8, 6, **options), height) for height in (8, 32)
    )
    assert small_state == large_state
    # The loop holds what it draws once before it is handed over.
    assert large - small <= more_drawn - drawn
    (_, small_cache, _), (_, large_cache, _) = (
        temporary_bytes(model_of(8, 8, 6, mixer="causal_softmax", **options), height) for height in (8, 32)
    )
    assert large_cache > 3.5 * small_cache


def work_of_a_pixel(model, height):
    """Floating-point operations of one pixel of two images of `height` x 8, in the compiled program."""
    graph, variables = nnx.split(model.apart())
    size = height, 8
    state = jax.eval_shape(lambda variables: initial_state(nnx.merge(graph, variables), 2, size), variables)
    keys = jax.eval_shape(lambda: image_keys(KEY, 0, 2))
    return _draw.lower(graph, size, 1, Sampling(), variables, state, keys).compile().cost_analysis()["flops"]


def test_time_is_linear_in_the_image():
    """A pixel is as much work in an image of four times the rows; of a cache all of it is read."""
    options = {"position": "sincos", "local_context": 2}
    small, large = (work_of_a_pixel(model_of(8, 8, 6, **options), height) for height in (8, 32))
    assert large == pytest.approx(small, rel=1e-3)
    small, large = (
        work_of_a_pixel(model_of(8, 8, 6, mixer="causal_softmax", **options), height) for height in (8, 32)
    )
    images, layers, more_tokens, dim = 2, 4, 24 * 8, 64
    assert large - small > images * layers * 2 * (2 * more_tokens * dim)  # Of scores, and of what they weigh.


# --- What is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 0.0},
            r"temperature is 0.0; expected a positive number \(top_k=1 takes the most probable\)",
        ),
        ({"temperature": -1.0}, "temperature is -1.0; expected a positive number"),
        ({"top_k": 7}, "top_k is 7; expected 1 to 6, the levels of the model"),
        ({"top_k": 0}, "top_k is 0; expected 1 to 6"),
        ({"top_p": 1.5}, r"top_p is 1.5; expected a probability in \(0, 1\]"),
        ({"batch": 0}, "batch is 0"),
        (
            {"prompt": np.zeros((1, 2, 4, 1), int)},
            r"the prompt has shape \(1, 2, 4, 1\); expected \[1 or 2, up to 4 rows, 5, 1\]",
        ),
        ({"prompt": np.zeros((1, 5, 5, 1), int)}, r"the prompt has shape \(1, 5, 5, 1\)"),
        ({"prompt": np.zeros((3, 2, 5, 1), int)}, r"the prompt has shape \(3, 2, 5, 1\)"),
        ({"prompt": np.zeros((1, 2, 3), int)}, r"up to 20 pixels, 1\]"),
        (
            {"prompt": np.full((1, 2, 5, 1), 6)},
            "the prompt has levels 6 to 6; expected 0 to 5, as the model knows 6",
        ),
        ({"prompt": np.full((1, 2, 5, 1), -1)}, "the prompt has levels -1 to -1"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), KEY, **({"batch": 2} | options))


def test_models_that_cannot_draw():
    with pytest.raises(ValueError, match="the model predicts no pixels: its tokens are patches"):
        generate(create_model("vir_pico1", num_classes=2, rngs=nnx.Rngs(0), image_size=2), KEY, 1)
    with pytest.raises(ValueError, match=r"retention='2d'\) cannot draw pixel by pixel"):
        generate(model_of(2, 2, 3, local_context=1, retention="2d"), KEY, 1)
