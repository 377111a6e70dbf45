"""With JAX's 64 bits on (`JAX_ENABLE_X64`) everything is computed in the dtypes that it is computed in without."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import lively
from tests.ops.cases import assert_close, random_case
from vir_jax.generation import Sampling, pieces
from vir_jax.generation.sampling import image_keys
from vir_jax.inference.recurrent import stream
from vir_jax.models.pixels import to_levels
from vir_jax.ops import MODES, retention
from vir_jax.ops.kernels import PLATFORMS
from vir_jax.parallel.mesh import make_mesh
from vir_jax.tasks import make_task
from vir_jax.training.plan import make_plan

FP32 = 3e-6
IMAGE = (2, 8, 12, 3)
NORMALIZATION = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def compare(function, *arguments):
    """`function` gives the same with 64 bits and without, and no array of float64 is made on the way.

    A scalar may be: Python's numbers, and the counts of Optax, before they meet an array.
    """
    arguments = jax.tree.map(np.asarray, arguments)
    expected = jax.jit(function)(*arguments)
    with jax.enable_x64(True):
        lowered = jax.jit(function).lower(*arguments)
        assert not re.search(r"tensor<(\d+x)+f64>", lowered.as_text())
        results = lowered.compile()(*arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(results, expected)
    assert_close(results, expected, FP32)


def model_and_images(shape=IMAGE, **options):
    graph, params = nnx.split(lively("vir_pico2", **({"image_size": shape[1:3]} | options)))
    return graph, params, np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *((mode, {"position": "sincos"}) for mode in MODES),
        ("chunkwise", {"retention": "2d", "image_size": (6, 6)}),
        ("auto", {"bidirectional": True, "dtype": jnp.bfloat16}),
        ("auto", {"mixer": "retnet", "position": "rope"}),
        ("auto", {"mixer": "nystromformer", "position": "rope_2d", "stem": "conv"}),
        ("auto", {"mixer": "linformer", "image_size": (6, 6)}),
    ],
)
def test_a_model_and_its_gradients(mode, options):
    graph, params, images = model_and_images(drop_path_rate=0.5, **options)

    def loss(params, images):
        logits = nnx.merge(graph, params)(images, mode=mode, key=jax.random.key(0))
        return jnp.sum(logits**2), logits

    compare(jax.value_and_grad(loss, has_aux=True), params, images)


@pytest.mark.parametrize("options", [{"position": "sincos"}, {"retention": "2d", "image_size": (6, 6)}])
def test_a_stream(options):
    graph, params, images = model_and_images(**options)
    pixels = (100 + 50 * images).clip(0, 255).astype(np.uint8)
    read = partial(stream, chunk_size=7, normalization=NORMALIZATION)
    compare(lambda params, pixels: read(nnx.merge(graph, params), pixels), params, pixels)


@pytest.mark.parametrize(
    "options", [{"levels": 17}, {"levels": 256, "channels": 3, "mixtures": 2}], ids=["grey", "rgb"]
)
def test_a_model_of_pixels_and_what_it_draws(options):
    graph, params = nnx.split(
        lively("vir_pico1", image_size=(3, 4), stem="pixels", local_context=1, **options)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(np.uint8)

    def loss(params, pixels):
        model = nnx.merge(graph, params)
        likelihood = model.stem.likelihood
        levels = to_levels(pixels, likelihood.levels, likelihood.channels)
        return jnp.mean(likelihood.log_probability(model(levels), levels.reshape(2, 12, -1)))

    def drawn(params):
        model = nnx.merge(graph, params).apart()
        keys = image_keys(jax.random.key(0, impl="threefry2x32"), 0, 2)

        def step(state, _):
            state, pixel, _ = pieces.draw(model, state, keys, Sampling(top_k=9, top_p=0.9), (3, 4))
            return state, pixel

        return jax.lax.scan(step, pieces.initial_state(model, 2, (3, 4)), None, length=12)[1]

    compare(jax.value_and_grad(loss), params, pixels)
    compare(drawn, params)


def test_a_training_step(digits_config):
    digits_config.model.position, digits_config.batch_size = "sincos", 16
    # Optax computes 1 - b^step in float64 then, to five digits more than 1 - 0.999 has in float32. This b loses none.
    digits_config.optim.b1 = digits_config.optim.b2 = 0.875
    mesh = make_mesh(devices=jax.devices()[:1])
    plan = make_plan(digits_config, mesh, task=make_task(digits_config, "0123456789"), steps_per_epoch=10.0)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8),
        "label": rng.integers(0, 10, 16).astype(np.int32),
    }
    state = plan.init(jax.random.key(0))
    compare(plan.step, state, batch)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("name", PLATFORMS)
def test_kernels(name):
    case = random_case(n=70, h=2)

    def run(arguments, cotangents):
        def op(q, k, v, log_decay, state):
            return retention(q, k, v, log_decay, initial_state=state, implementation=name)

        results, pull_back = jax.vjp(op, *arguments)
        return results, pull_back(cotangents)

    compare(run, case.arguments, case.cotangents)
