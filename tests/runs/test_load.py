import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vir_jax.models.pixels import normalize
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.checkpoint_reader import NotEvaluatedError, has_checkpoints
from vir_jax.runs.config import default_config
from vir_jax.runs.load import load_run
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import TrainState

NAMES = ("ant", "bee", "cat")


def make_config():
    config = default_config()
    config.model.name, config.model.image_size, config.model.dtype = "vir_pico4", (8, 8), "float32"
    return config


@pytest.fixture(scope="module")
def weights():
    init = jax.jit(model_functions(make_config().model, len(NAMES)).init)
    return [init(jax.random.key(seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, weights):
    """Step 1 is the best one, 2 the last; of step 1 the weights are 0 and 1 (the average), of 2 they are 2 and 3."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, top1 in ((1, 0.75), (2, None)):
            raw, ema = weights[2 * step - 2 : 2 * step]
            state = TrainState(jnp.int32(step), raw, optax.sgd(1.0).init(raw), ema)
            checkpoints.save(state, progress={}, config=make_config(), metadata={"class_names": list(NAMES)})
            if top1:
                checkpoints.record_evaluation(step, {"top1": top1}, score=top1)
    return folder


def leaves(tree):
    return jax.tree.map(np.asarray, jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("arguments", "step", "kind", "index", "metrics"),
    [
        ({}, 1, "ema", 1, {"top1": 0.75}),
        ({"weights": "raw"}, 1, "raw", 0, {"top1": 0.75}),
        ({"checkpoint": "last"}, 2, "ema", 3, None),
        ({"checkpoint": "2", "weights": "raw"}, 2, "raw", 2, None),
    ],
)
def test_what_a_run_says_of_itself(workdir, weights, arguments, step, kind, index, metrics):
    run = load_run(workdir, **arguments)
    assert (run.step, run.weights, run.metrics, run.class_names) == (step, kind, metrics, NAMES)
    assert (run.workdir, run.config.model.name) == (workdir, "vir_pico4")
    chex.assert_trees_all_equal(leaves(run.params), leaves(weights[index]))


def test_the_model_has_the_weights_of_the_run(workdir):
    run = load_run(str(workdir))
    images = normalize(jnp.full((2, 8, 8, 3), 200, jnp.uint8), (0.5,) * 3, (0.5,) * 3)
    assert run.model is run.model
    np.testing.assert_allclose(run.model(images), run.functions.apply(run.params, images), rtol=1e-5)


def test_weights_lie_on_the_mesh(workdir):
    on_one = load_run(workdir).params
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    split = load_run(workdir, mesh=mesh).params
    chex.assert_trees_all_equal(leaves(split), leaves(on_one))
    kernel = split["stage"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(on_one))


def test_a_run_that_was_never_evaluated_has_no_best(tmp_path, weights):
    assert not has_checkpoints(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        state = TrainState(jnp.int32(7), weights[0], optax.sgd(1.0).init(weights[0]), None)
        checkpoints.save(state, progress={}, config=make_config(), metadata={"class_names": list(NAMES)})
    assert has_checkpoints(tmp_path)
    with pytest.raises(NotEvaluatedError, match=r"none was evaluated; choose 'last' .* steps there: \[7\]"):
        load_run(tmp_path)
    run = load_run(tmp_path, "last")
    assert (run.step, run.weights) == (7, "raw")
    with pytest.raises(ValueError, match="holds no EMA"):
        load_run(tmp_path, "last", weights="ema")


def test_mistakes_are_explained(workdir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoints in"):
        load_run(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    with pytest.raises(ValueError, match=r"no checkpoint '3' .* steps there: \[1, 2\]"):
        load_run(workdir, "3")
