"""A pyramid in training: its statistics on any mesh, a run that was stopped, and optimisers that know its blocks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vir_jax.training.loop
from vir_jax.data import open_source
from vir_jax.data.digits import DigitsSource
from vir_jax.evaluation import evaluate_workdir
from vir_jax.parallel.mesh import make_mesh
from vir_jax.parallel.sharding import dotted
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.load import load_run
from vir_jax.runs.model import model_functions
from vir_jax.tasks import make_task
from vir_jax.training.loop import train
from vir_jax.training.optimizer import make_optimizer
from vir_jax.training.plan import make_plan
from vir_jax.training.transfer import layer_factors
from vir_jax.weights import load, save


class FewDigits(DigitsSource):
    """The first images to evaluate on."""

    def __len__(self):
        return 64


@pytest.fixture
def config(digits_config):
    model = digits_config.model
    model.name, model.stem_stride, model.position, model.layer_scale = "vir_h_nano", 1, "none", None
    digits_config.accumulation_steps, digits_config.batch_size, digits_config.eval_batch_size = 1, 16, 64
    digits_config.epochs, digits_config.optim.warmup_epochs, digits_config.optim.cooldown_epochs = (
        0.1,
        0.02,
        0.0,
    )
    digits_config.checkpoint_every, digits_config.eval_every = 4, 0
    return digits_config


@pytest.fixture
def stopped(config, tmp_path, monkeypatch):
    """A run that was stopped and went on, beside one that was not."""
    on_one = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(vir_jax.training.loop, "make_mesh", on_one)
    train(config, tmp_path / "whole", eval_source=FewDigits("test"))
    take_metrics = vir_jax.training.loop.take_metrics

    def stop(step, *arguments):
        take_metrics(step, *arguments)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vir_jax.training.loop, "take_metrics", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped", eval_source=FewDigits("test"))
    train(config, tmp_path / "stopped", eval_source=FewDigits("test"))
    return tmp_path


def test_a_run_that_was_stopped_ends_bit_equal_and_is_used_as_any_other(stopped):
    states = []
    for name in ("whole", "stopped"):
        with CheckpointReader(stopped / name) as checkpoints:
            last = checkpoints.resolve("last")
            states.append([checkpoints.restore_params(last, weights=kind) for kind in ("raw", "ema")])
    jax.tree.map(np.testing.assert_array_equal, *states)
    raw, average = (state["readout"]["norm"]["mean"] for state in states[0])
    assert np.any(raw != average)

    results = evaluate_workdir(stopped / "whole", mode="all", source=FewDigits("test"))
    assert set(results) == {"parallel", "recurrent", "chunkwise"}

    run = load_run(stopped / "whole", "last")
    save(stopped / "weights", run)
    with pytest.raises(
        ValueError, match="'vir_h_nano' is a pyramid: it has stages of several widths, and no patch"
    ):
        load(stopped / "weights", patch=8)
    grey = load(stopped / "weights", channels=1)
    assert grey.card.model.items() >= {"name": "vir_h_nano", "stem_stride": 1, "layer_scale": None}.items()
    kernel = run.params["stem"]["conv1"]["conv"]["kernel"]
    found = grey.params["stem"]["conv1"]["conv"].pop("kernel")
    np.testing.assert_allclose(found, kernel.sum(2, keepdims=True), rtol=1e-4, atol=1e-6)
    del run.params["stem"]["conv1"]["conv"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, grey.params, run.params)


def test_statistics_and_parameters_are_the_same_on_one_device_and_eight(config):
    source = open_source("digits", "train")
    examples = [source[index] for index in range(config.batch_size)]
    batch = {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
    }

    def stepped(devices):
        mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
        plan = make_plan(
            config, mesh, task=make_task(config, source.class_names), steps_per_epoch=len(source) / 16
        )
        state = plan.init(jax.random.key(0))
        with jax.set_mesh(mesh):
            placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), batch, plan.batch)
            before = jax.device_get(state.params)
            return before, jax.device_get(plan.compile()(state, placed)[0].params)

    (before, one), (_, eight) = stepped(1), stepped(8)
    chex.assert_trees_all_close(eight, one, rtol=2e-4, atol=2e-5)
    for name in ("mean", "var"):
        assert np.all(one["readout"]["norm"][name] != before["readout"]["norm"][name])
        blocks = (tree["stages"][1]["parts"][0]["blocks"]["conv2"]["norm"] for tree in (one, before))
        assert np.all(np.not_equal(*(block[name] for block in blocks)))


@pytest.fixture
def params(config):
    return jax.eval_shape(model_functions(config.model, 3).init, jax.random.key(0))


def by_name(tree):
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_layers_are_counted_through_all_stages(params):
    """Eight blocks in stages of 2, 2, 3 and 1: the last 1/2, the first 1/256, the stem 1/512."""
    factors = by_name(layer_factors(params, 0.5))
    for stage, exponents in enumerate(([8, 7], [6, 5], [4, 3, 2], [1])):
        kernel = "conv1.conv.kernel" if stage < 2 else "mlp.up.kernel"
        found = factors[f"stages.{stage}.parts.0.blocks.{kernel}"]
        assert found.ravel().tolist() == [0.5**exponent for exponent in exponents]
        if stage < 3:
            assert factors[f"stages.{stage}.downsample.kernel"] == 0.5 ** exponents[-1]
    assert factors["stem.conv2.conv.kernel"] == 0.5**9
    assert factors["readout.norm.scale"] == factors["readout.head.kernel"] == 1


def test_muon_makes_the_convolutions_of_blocks_orthogonal_too(params):
    """As matrices of all inputs below the window to outputs."""
    options = {"b1": 0.95, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    params = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(0).normal(size=leaf.shape), leaf.dtype), params
    )
    optimizer = make_optimizer("muon", **options)
    updates, _ = jax.jit(lambda params: optimizer.update(params, optimizer.init(params), params))(params)
    for path in ("stages.0.parts.0.blocks.conv1.conv.kernel", "stages.1.parts.0.blocks.conv2.conv.kernel"):
        for kernel in np.asarray(by_name(updates)[path]):
            values = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False)
            assert values.max() / values.min() < 2.5
    other = np.asarray(by_name(updates)["stages.0.downsample.kernel"])
    assert np.ptp(np.abs(other)) < 1e-2  # Adam's, of one step.
