"""Linformer: with as many mixtures as tokens it is attention; other sizes of image resample its matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import images, relative_error
from vir_jax.models.layout import Layout
from vir_jax.models.mixers.linformer import Compression, Linformer

LAYOUT = Layout(cols=4, patches=12, class_token="first")


def made(**options):
    return Linformer(16, 2, LAYOUT, rank=13, dtype=jnp.float32, rngs=nnx.Rngs(0), **options)


def identity(compression):
    compression.class_kernel[...] = jnp.eye(13)[:1]
    compression.patch_kernel[...] = jnp.eye(13)[1:].reshape(1, 3, 4, 13)


@pytest.mark.parametrize("one_kv_head", [False, True])
@pytest.mark.parametrize("share_kv", [False, True])
def test_with_every_token_a_mixture_it_is_softmax_attention(share_kv, one_kv_head):
    mixer, x = made(share_kv=share_kv, one_kv_head=one_kv_head), images((2, 13, 16))
    identity(mixer.key_compression)
    if mixer.value_compression is not None:
        identity(mixer.value_compression)
    out, _, found = mixer(x, LAYOUT)
    k, v = mixer.k(x), (mixer.k if share_kv else mixer.v)(x)
    expected = mixer.out(jax.nn.dot_product_attention(mixer.q(x), k, v))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert found["k"].shape == (2, 13, 1 if one_kv_head else 2, 8)


def test_shared_values_are_the_keys_before_they_are_turned():
    mixer, x = made(), images((1, 13, 16))
    mixer.use_rope("1d")
    found = mixer(x, LAYOUT)[2]
    np.testing.assert_array_equal(found["v"], mixer.k(x))
    assert jnp.any(found["k"] != found["v"])


def test_all_mix_with_initial_weights_within_one_over_the_root_of_the_rank():
    compression = Compression(Layout(cols=32, patches=1024, class_token="first"), 64, rngs=nnx.Rngs(0))
    e = compression.matrix(Layout(cols=32, patches=1024, class_token="first"))
    assert e.shape == (1025, 64)
    assert 0.1249 < float(jnp.max(jnp.abs(e))) <= 0.125
    assert abs(float(jnp.mean(e))) < 0.002


def test_the_same_picture_in_more_pixels_has_the_same_mixtures():
    """Its matrix is resampled on the grid; the class token's row is left as it is."""
    compression = Compression(LAYOUT, 3, rngs=nnx.Rngs(0))
    y, x = np.indices((3, 4))
    compression.patch_kernel[...] = jnp.asarray(
        np.stack([y + 1, x + 1, np.ones_like(x)], -1)[None], jnp.float32
    )
    tokens = np.asarray(images((3, 4)))
    larger = tokens.repeat(4, axis=0).repeat(4, axis=1)
    layout = Layout(cols=16, patches=12 * 16, class_token="first")
    e, resampled = np.asarray(compression.matrix(LAYOUT)), np.asarray(compression.matrix(layout))
    np.testing.assert_array_equal(e[0], resampled[0])
    same, more = tokens.reshape(-1) @ e[1:], larger.reshape(-1) @ resampled[1:]
    np.testing.assert_allclose(more[2], same[2], rtol=1e-4)
    assert relative_error(more, same) < 0.1
    wide = compression.matrix(Layout(cols=2, patches=10, class_token="first"))
    assert wide.shape == (11, 3)
