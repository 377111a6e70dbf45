"""MLP-Mixer: the tokens' perceptron is the channels' on the transpose; no class token."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.models.helpers import GRID, images, lively, run
from vir_jax.models.layers import MLP
from vir_jax.models.layout import Layout
from vir_jax.models.mixers.mlp_mixer import MLPMixer

LAYOUT = Layout(cols=4, patches=12, class_token=None)


def test_tokens_are_mixed_as_channels_are_in_the_transpose():
    mixer = MLPMixer(16, 1, LAYOUT, token_hidden=20, dtype=jnp.float32, rngs=nnx.Rngs(0))
    channels = MLP(12, 20, dtype=jnp.float32, rngs=nnx.Rngs(1))
    channels.up, channels.down = mixer.up, mixer.down
    for layer in (mixer.up, mixer.down):
        layer.bias[...] = images(layer.bias.shape)
    x = images((2, 12, 16))
    np.testing.assert_allclose(
        mixer(x, LAYOUT)[0], jnp.swapaxes(channels(jnp.swapaxes(x, 1, 2)), 1, 2), rtol=1e-5, atol=1e-6
    )
    mixer.down.kernel[...] = jnp.zeros((20, 12))
    mixer.down.bias[...] = jnp.zeros(12)
    assert not jnp.any(mixer(x, LAYOUT)[0])


def test_the_head_reads_the_average_and_there_is_no_class_token():
    model = lively("vit_pico1", mixer="mlp_mixer", position="none")
    assert model.stem.class_token is None
    assert model.layout(GRID) == LAYOUT
    features = run(model, images(), "intermediates", names=("blocks.3.tokens", "logits"))
    expected = model.readout.logits(jnp.mean(features["blocks.3.tokens"], axis=1))
    np.testing.assert_allclose(features["logits"], expected, rtol=1e-5, atol=1e-5)
