"""A model with batch normalisation: its statistics go through step, average and mesh.

Through checkpoints and resuming: `test_pyramid.py`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vir_jax.data import open_source
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.model import ModelFunctions, model_functions
from vir_jax.tasks import make_task
from vir_jax.training.plan import make_plan
from vir_jax.training.summary import count_parameters

MOMENTUM = 0.9


class NormalizedStem(nnx.Module):
    """The tokens of another stem, each channel normalised over batch and places."""

    def __init__(self, stem, rngs):
        self.stem = stem
        self.norm = nnx.BatchNorm(stem.dim, momentum=MOMENTUM, rngs=rngs)

    def __call__(self, images):
        x, layout, embedded = self.stem(images)
        return self.norm(x), layout, embedded

    def __getattr__(self, name):
        return getattr(self.stem, name)


def with_batch_norm(options, num_classes):
    functions = model_functions(options, num_classes)

    def make(rngs):
        model = functions.make(rngs)
        model.stem = NormalizedStem(model.stem, rngs)
        model.eval()
        return model

    return ModelFunctions(make, nnx.eval_shape(lambda: make(nnx.Rngs(0))))


@pytest.fixture
def config(digits_config, monkeypatch):
    for module in ("vir_jax.training.plan", "vir_jax.runs.load"):
        monkeypatch.setattr(f"{module}.model_functions", with_batch_norm)
    digits_config.batch_size = 64
    return digits_config


def stepped(config, devices, slices=1):
    """The plan; the state before, after one and after two steps on the same batch; the metrics of the first."""
    config.accumulation_steps = slices
    source = open_source("digits", "train")
    examples = [source[index] for index in range(config.batch_size)]
    batch = {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
    }
    mesh = make_mesh(*devices, devices=jax.devices()[: int(np.prod(devices))])
    plan = make_plan(config, mesh, task=make_task(config, source.class_names), steps_per_epoch=10.0)
    state = plan.init(jax.random.key(0))
    with jax.set_mesh(mesh):
        batch = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), batch, plan.batch)
        first, metrics = plan.step(state, batch)
        second, _ = plan.step(first, batch)
    return plan, jax.device_get((state, first, second, metrics))


def norm_of(params):
    return params["stem"]["norm"]


def test_a_step_moves_them_as_batch_normalisation_says(config):
    """running = 0.9 running + 0.1 batch, of what the stem computed with the parameters of before the step."""
    config.mixing.mixup_alpha = config.mixing.cutmix_alpha = 0.0
    plan, (state, first, _, metrics) = stepped(config, (1, 1, 1))
    assert plan.model.has_statistics
    without = model_functions(config.model, 10)
    assert not without.has_statistics
    added = norm_of(state.params)
    counts = [count_parameters(functions.parameters) for functions in (plan.model, without)]
    assert counts[0] == counts[1] + added["scale"].size + added["bias"].size
    np.testing.assert_array_equal(norm_of(state.params)["mean"], 0.0)
    source = open_source("digits", "train")
    images = np.stack([source[index]["image"] for index in range(config.batch_size)])
    task = make_task(config, source.class_names)
    model = plan.model.model(jax.tree.map(jnp.asarray, state.params))
    tokens, *_ = model.stem.stem(task.inputs({"image": jnp.asarray(images)}))
    tokens = np.asarray(tokens, np.float64)
    mean, variance = tokens.mean((0, 1)), tokens.var((0, 1))
    found = norm_of(first.params)
    np.testing.assert_allclose(found["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * variance, rtol=1e-4)
    # Neither gradient nor weight decay touches them; the average follows them as it does parameters.
    assert np.any(norm_of(first.ema)["mean"] != norm_of(state.ema)["mean"])
    assert np.any(norm_of(first.params)["scale"] != norm_of(state.params)["scale"])
    # They are no parameters, whose norm is told.
    norm_of(first.params).update(mean=np.zeros(1), var=np.zeros(1))
    np.testing.assert_allclose(metrics["parameter_norm"], optax.tree.norm(first.params), rtol=1e-5)


@pytest.mark.usefixtures("compiled_afresh")
def test_they_are_those_of_the_whole_batch_on_any_mesh(config):
    _, (_, _, one, _) = stepped(config, (1, 1, 1), slices=2)
    _, (_, _, many, _) = stepped(config, (2, 1, 2), slices=2)
    chex.assert_trees_all_close(many, one, rtol=2e-4, atol=2e-5)
