"""Nyströmformer: exact where it should be, its inverse, its padding, its convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import images, relative_error
from vir_jax.models.mixers import nystromformer
from vir_jax.models.mixers.nystromformer import TAPS, token_convolution

nystrom_attention = jax.jit(nystromformer.nystrom_attention, static_argnames=("landmarks", "iterations"))
pseudo_inverse = jax.jit(nystromformer.pseudo_inverse, static_argnums=1)


def draw(shape, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for _ in range(3)]


@pytest.mark.parametrize(("iterations", "error"), [(6, 0.05), (12, 1e-3), (20, 1e-5)])
def test_with_every_token_a_landmark_it_is_softmax_attention(iterations, error):
    q, k, v = draw((1, 16, 2, 32))
    out = nystrom_attention(q, k, v, landmarks=16, iterations=iterations)
    assert relative_error(out, jax.nn.dot_product_attention(q, k, v)) < error
    capped = nystrom_attention(q, k, v, landmarks=64, iterations=iterations)
    np.testing.assert_array_equal(capped, out)


@pytest.mark.parametrize(("iterations", "error"), [(6, 0.05), (16, 1e-4)])
def test_tokens_that_are_equal_within_segments_are_attended_to_exactly(iterations, error):
    q, k, v = draw((1, 40, 1, 16))
    q, k = (x[:, :8].repeat(5, axis=1) for x in (q, k))
    out = nystrom_attention(q, k, v, landmarks=8, iterations=iterations)
    assert relative_error(out, jax.nn.dot_product_attention(q, k, v)) < error


def test_the_inverse_comes_nearer_with_iterations_and_takes_each_matrix_by_itself():
    a = jax.nn.softmax(jnp.stack(draw((24, 24))), axis=-1)
    errors = [relative_error(a @ pseudo_inverse(a, n) @ a, a) for n in (2, 6, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2
    alone = pseudo_inverse(a[:1], 6)
    beside = pseudo_inverse(jnp.stack([a[0], jnp.eye(24)]), 6)
    np.testing.assert_allclose(beside[:1], alone, rtol=1e-5, atol=1e-5)
    flat = jnp.full((24, 24), 1 / 24)
    np.testing.assert_allclose(flat @ pseudo_inverse(flat, 6) @ flat, flat, rtol=1e-5)


def test_zero_tokens_are_put_before_the_first():
    q, k, v = draw((1, 13, 2, 8))
    padded = [jnp.concatenate([jnp.zeros((1, 3, 2, 8)), x], axis=1) for x in (q, k, v)]
    whole = nystrom_attention(*padded, landmarks=4, iterations=6)
    out = nystrom_attention(q, k, v, landmarks=4, iterations=6)
    np.testing.assert_allclose(out, whole[:, 3:], rtol=1e-5, atol=1e-6)


def test_at_the_published_size():
    q, k, v = draw((1, 1025, 1, 8))
    out = nystrom_attention(q, k, v, landmarks=64, iterations=6)
    assert out.shape == (1, 1025, 1, 8)
    assert jnp.all(jnp.isfinite(out))


def test_examples_do_not_meet():
    q, k, v = draw((2, 20, 2, 8))
    before, after = (
        nystrom_attention(q, k * s, v, landmarks=4, iterations=6)
        for s in (1.0, jnp.array([1.0, 9.0])[:, None, None, None])
    )
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-6)


def test_the_convolution_correlates_each_head_with_its_filter():
    x, kernel = images((1, 150, 2, 3)), images((2, TAPS))
    out = np.asarray(token_convolution(x, kernel))
    for head in range(2):
        for channel in range(3):
            expected = np.correlate(np.pad(x[0, :, head, channel], 16), kernel[head])
            np.testing.assert_allclose(out[0, :, head, channel], expected, rtol=1e-4, atol=1e-4)
    changed = token_convolution(x.at[0, 75].add(1.0), kernel) != out
    np.testing.assert_array_equal(np.flatnonzero(np.any(changed, axis=(0, 2, 3))), np.arange(59, 92))
