"""Every recipe builds its model and its training step; nothing is allocated."""

import importlib.util
from pathlib import Path

import jax
import ml_collections
import pytest

from vir_jax.training.config import default_config, validate
from vir_jax.training.loop import batch_shapes, step_config
from vir_jax.training.mesh import make_mesh
from vir_jax.training.model import image_size, model_functions
from vir_jax.training.optimizer import learning_rate_schedule, make_optimizer
from vir_jax.training.sharding import state_shardings
from vir_jax.training.state import create_train_state
from vir_jax.training.step import make_train_step
from vir_jax.training.summary import count_parameters

FOLDER = Path(__file__).parents[1] / "configs"
PARAMETERS = {
    "vir_ti": 5_721_832,
    "vir_s": 22_059_496,
    "vir_b": 86_585_320,
    "vir_l": 304_374_760,
    "vit_b": 86_567_656,
    "vir_digits": 203_146,
    "vir_cifar10": 208_522,
}


def load(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments), module.__doc__


def test_every_recipe_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_and_step(name):
    config, doc = load(name)
    validate(config)
    assert config.is_locked
    assert f"--config=configs/{name}.py" in doc
    assert "esult" in doc
    classes = 1000 if config.data.dataset == "imagenet2012" else 10
    model = model_functions(config.model, classes)
    schedule = learning_rate_schedule(config, steps_per_epoch=100.0)
    optimizer = make_optimizer(config.optim, schedule)
    state = jax.eval_shape(
        lambda key: create_train_state(model.init(key), optimizer, ema=config.ema_decay > 0),
        jax.random.key(0),
    )
    step = make_train_step(model.apply, optimizer, schedule, step_config(config, classes))
    batch = batch_shapes(config, image_size(config.model), make_mesh())
    stepped, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stepped) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()
    assert count_parameters(state.params) == PARAMETERS[name]
    state_shardings(state, make_mesh(**config.mesh))


def test_recipes_differ_from_vir_b_only_where_they_say():
    base = default_config()
    assert load("vir_b")[0].eq_as_configdict(base)
    vit, _ = load("vit_b")
    vit.model.name = base.model.name
    assert vit.eq_as_configdict(base)


def test_cifar10_compares_models_with_one_recipe():
    vir, _ = load("vir_cifar10")
    vit, _ = load("vir_cifar10", "model=vit_mu4")
    assert isinstance(vit, ml_collections.ConfigDict)
    assert vit.model.name == "vit_mu4"
    vit.model.name = vir.model.name
    assert vit.eq_as_configdict(vir)
    with pytest.raises(ValueError, match="did you mean 'model'"):
        load("vir_cifar10", "modle=vit_mu4")
