"""RetNet's retention: its own decays, its norm, its gate, and no length of the sum that the norm would not undo."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.models.helpers import images
from vir_jax.models.layout import Layout
from vir_jax.models.mixers.retnet import RetNet

LAYOUT = Layout(cols=4, patches=12, class_token="last")


def test_as_defined():
    mixer = RetNet(16, 2, LAYOUT, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for layer in (mixer.qkv, mixer.gate, mixer.out):
        layer.kernel[...] = images(layer.kernel.shape)
    x = np.asarray(images((2, 13, 16)), np.float64)
    q, k, v = np.einsum("bnc,cthd->tbnhd", x, np.asarray(mixer.qkv.kernel[...], np.float64))
    elapsed = np.arange(13)[:, None] - np.arange(13)
    gamma = np.array([1 - 1 / 32, 1 - 1 / 64])[:, None, None]
    mask = np.where(elapsed >= 0, gamma ** np.maximum(elapsed, 0), 0)
    mask /= np.sqrt(mask.sum(-1, keepdims=True))  # As RetNet has it, and to no effect.
    heads = np.einsum("bnhd,bmhd,hnm,bmhe->bnhe", q, k, mask, v)
    heads /= np.sqrt(np.mean(heads**2, axis=-1, keepdims=True))
    gate = np.einsum("bnc,chd->bnhd", x, np.asarray(mixer.gate.kernel[...], np.float64))
    heads *= gate / (1 + np.exp(-gate))
    expected = np.einsum("bnhd,hdc->bnc", heads, np.asarray(mixer.out.kernel[...], np.float64))
    np.testing.assert_allclose(mixer(jnp.asarray(x, jnp.float32), LAYOUT)[0], expected, rtol=1e-3, atol=1e-4)
