"""Every recipe builds its model and its training step; nothing is allocated."""

import importlib.util
from pathlib import Path

import jax
import ml_collections
import pytest

from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.config import default_config, validate
from vir_jax.tasks import make_task
from vir_jax.training.program import make_program
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
    mesh = make_mesh(**config.mesh)
    task = make_task(config, [str(number) for number in range(classes)])
    program = make_program(config, mesh, task=task, steps_per_epoch=100.0)
    stepped, metrics = jax.eval_shape(program.step, program.state, program.batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stepped) == jax.tree.map(
        lambda x: (x.shape, x.dtype), program.state
    )
    assert metrics["loss"].shape == ()
    assert count_parameters(program.state.params) == PARAMETERS[name]


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
