"""Whole models of Vision X-formers: they learn, are traced once, and their memory grows with tokens as it should."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from tests.models.helpers import create, images
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import mixer_type
from vir_jax.models.variables import split_variables

LINEAR = {
    "performer": {"features": 8},
    "nystromformer": {"landmarks": 8},
    "linformer": {"rank": 8},
    "fnet": {},
}


@pytest.mark.parametrize(
    ("mixer", "stem", "position"),
    [
        ("softmax", "conv_vix", "rope"),
        ("performer", "linear", "rope"),
        ("nystromformer", "conv", "rope_2d"),
        ("mlp_mixer", "linear", "none"),
    ],
)
def test_64_random_images_are_learned_by_heart_in_one_trace(mixer, stem, position):
    x, labels = images((64, 2, 2, 3)), jnp.arange(64) % 5
    options = {"mixer": mixer, "stem": stem, "position": position, "image_size": 2}
    graph, params, constants = split_variables(jax.jit(lambda: create("vit_pico1", **options))())
    optimizer, traces = optax.adam(3e-3), []

    @jax.jit
    def step(params, optimizer_state):
        traces.append(None)

        def loss(params):
            logits = nnx.merge(graph, params, jax.lax.stop_gradient(constants))(x)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(params, updates), optimizer_state, value

    state = optimizer.init(params)
    for _ in range(150):
        params, state, value = step(params, state)
        if value < 0.5:
            break
    assert value < 0.5
    assert len(traces) == 1


@pytest.mark.parametrize("mixer", ["causal_softmax", "softmax", *LINEAR])
def test_memory_grows_with_tokens_in_proportion(mixer):
    """The compiled program's temporary memory, of four times as many tokens: no mixer's is as their square on a CPU."""

    def temporary_bytes(side):
        layout = Layout(cols=side, patches=side * side, class_token="first")
        options = LINEAR.get(mixer, {})

        def mixed(x):
            rngs = nnx.Rngs(0)
            return mixer_type(mixer)(16, 1, layout, dtype=jnp.float32, rngs=rngs, **options)(x, layout)[0]

        x = jax.ShapeDtypeStruct((1, layout.length, 16), jnp.float32)
        return jax.jit(mixed).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64) / temporary_bytes(32) < 6
