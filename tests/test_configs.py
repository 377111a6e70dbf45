"""Every recipe, from wherever it is loaded: it is valid, and costs what its docstring says."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx

from vir_jax.models import create_model, flops
from vir_jax.models.mixers import mixer_names
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.config import flatten
from vir_jax.runs.migrations import migrate
from vir_jax.runs.recipes import define_recipe
from vir_jax.runs.validate import validate
from vir_jax.tasks import make_task
from vir_jax.training.optimizer import learning_rate_schedule
from vir_jax.training.plan import make_plan
from vir_jax.training.summary import count_parameters

# How ml_collections loads a recipe.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
FOLDER = Path(__file__).parents[1] / "configs"
RECIPES = (
    "vir_ti",
    "vir_s",
    "vir_b",
    "vir_l",
    "vit_b",
    "vir_digits",
    "vir_cifar10",
    "vir_h_ti",
    "vir_h_cifar10",
    "vir_digits_pixels",
    "vir_cifar10_pixels",
    "vix",
    "vir_digits_segmentation",
    "vir_pets_segmentation",
)
CHANGED_SINCE = {
    "vir_cifar10": {"accumulation_steps", "model.layer_scale", "model.position"},
    "vir_cifar10:model=vit_pico4": {"accumulation_steps", "model.position"},
}
"""Fields with other values than before the renames, on purpose."""
BEFORE = json.loads((Path(__file__).parent / "golden" / "recipes_before_renames.json").read_text())


def load(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments), module.__doc__


def num_classes(config):
    known = {"imagenet2012": 1000, "cifar10": 10, "digits": 10, "digits_scenes": 11, "oxford_iiit_pet": 3}
    return known[config.data.dataset]


def test_every_recipe_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*RECIPES, "imagenet"}


@pytest.mark.parametrize("name", RECIPES)
def test_it_loads_from_anywhere(name, tmp_path, monkeypatch):
    """Neither the working directory nor Python's path, nor other modules of these names there, play a part."""
    decoys = (
        tmp_path / "imagenet.py",
        tmp_path / "configs" / "imagenet.py",
        tmp_path / "configs" / "__init__.py",
    )
    (tmp_path / "configs").mkdir()
    for decoy in decoys:
        decoy.write_text("raise RuntimeError('the wrong module')\n")
    monkeypatch.chdir(tmp_path)
    root = str(FOLDER.parent)
    monkeypatch.setattr(
        sys, "path", [str(tmp_path), *(path for path in sys.path if path not in ("", ".", root))]
    )
    config, _ = load(name)
    assert config.is_locked
    validate(config)


@pytest.mark.parametrize("name", RECIPES)
def test_it_costs_what_it_says(name):
    config, doc = load(name)
    model = nnx.eval_shape(
        lambda: create_model(**config.model, num_classes=num_classes(config), rngs=nnx.Rngs(0))
    )
    parameters = count_parameters(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    size = config.model.image_size
    said = re.search(r"Cost: ([\d,]+) parameters, ([\d.]+) ([GM]) multiply-adds per image, (\d+) epochs", doc)
    assert int(said[1].replace(",", "")) == parameters
    assert float(said[2]) == round(flops(model, size, mode="parallel") / {"G": 1e9, "M": 1e6}[said[3]], 1)
    assert int(said[4]) == config.epochs + config.optim.cooldown_epochs
    assert re.search(r"Result[:,]\s", doc)


def commands(text):
    """The arguments of `python train.py` or vir-train wherever it is called, over continued lines too."""
    called = r"^\s*(?:python train\.py|vir-train) (.+?)(?:\s+#.*)?$"
    return re.findall(called, text.replace("\\\n", " "), re.MULTILINE)


def check_command(command):
    argv = ["train.py", *command.split()]
    values = flags.FlagValues()
    holder = define_recipe("config", "", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    assert values(argv) == ["train.py"]
    validate(holder.value)


@pytest.mark.parametrize("name", RECIPES)
def test_its_commands_are_right(name, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    _, doc = load(name)
    found = commands(doc)
    assert found[0].startswith(f"--config=configs/{name}.py --workdir=")
    for command in found:
        check_command(command)


def test_commands_of_the_pages_are_right(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    pages = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
    found = {page.name: commands(page.read_text()) for page in pages}
    assert all(
        found[name]
        for name in ("README.md", "start.md", "train.md", "data.md", "fine_tune.md", "generate.md")
    )
    for command in {command for of_page in found.values() for command in of_page}:
        check_command(command)


@pytest.mark.parametrize("name", RECIPES)
def test_it_evaluates_more_than_once(name):
    """Of one evaluation "best" would always be the last."""
    config, _ = load(name)
    examples = {
        "imagenet2012": 1_281_167,
        "cifar10": 50_000,
        "digits": 1_442,
        "digits_scenes": 10_000,
        "oxford_iiit_pet": 3680,
    }[config.data.dataset]
    steps = config.epochs * examples / config.batch_size
    assert 4 <= steps // config.eval_every <= 100


@pytest.mark.parametrize("name", BEFORE)
def test_it_trains_as_before_its_fields_were_renamed(name):
    recipe, _, argument = name.partition(":")
    config, _ = load(recipe, *filter(None, [argument]))
    before, now = (
        flatten(migrate(stored, where="the recipe"))
        for stored in (BEFORE[name], json.loads(config.to_json()))
    )
    changed = {field for field in before.keys() | now.keys() if before.get(field) != now.get(field)}
    assert changed == {"eval_every", *CHANGED_SINCE.get(name, ())}


@pytest.mark.parametrize("name", ["vir_l", "vir_digits", "vir_cifar10_pixels", "vir_digits_segmentation"])
def test_its_step(name):
    """Of those that differ most: it is traced, and changes no shape."""
    config, _ = load(name)
    mesh = make_mesh(**config.mesh)
    task = make_task(config, [str(number) for number in range(num_classes(config))])
    plan = make_plan(config, mesh, task=task, steps_per_epoch=100.0)
    stepped, metrics = jax.eval_shape(plan.step, plan.state, plan.batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stepped) == jax.tree.map(
        lambda x: (x.shape, x.dtype), plan.state
    )
    assert metrics["loss"].shape == ()


def test_families_are_compared_by_one_recipe():
    """ViR and ViT differ in name and LayerScale, which ViT has not."""
    for vir, vit in (
        (load("vir_b")[0], load("vit_b")[0]),
        (load("vir_cifar10")[0], load("vir_cifar10", "model=vit_pico4")[0]),
    ):
        vir, vit = flatten(vir), flatten(vit)
        assert {field for field in vir if vir[field] != vit[field]} == {"model.name", "model.layer_scale"}
        assert vit["model.layer_scale"] is None
    vir, pyramid = flatten(load("vir_cifar10")[0]), flatten(load("vir_h_cifar10")[0])
    assert {field for field in vir if vir[field] != pyramid[field]} == {
        "epochs",
        *("model.name", "model.stem_stride", "model.position", "model.layer_scale"),
    }
    vir, vit = (
        flatten(load("vir_cifar10_pixels", argument)[0]) for argument in (None, "mixer=causal_softmax")
    )
    assert {field for field in vir if vir[field] != vit[field]} == {"model.mixer"}


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("vir_cifar10", "modle=vit_pico4", "did you mean 'model'"),
        ("vir_cifar10", "model=vit_pico", "no model is called 'vit_pico'"),
        ("vir_cifar10", "epochs=ten", "no Python value"),
        ("vir_digits", "epochs=3", "takes none"),
        ("vix", "tokens=1024", "tokens=1024; expected one of 1025, 257, 65"),
        ("vir_b", "epochs=3", "takes none"),
        ("vir_h_ti", "epochs=3", "takes none"),
    ],
)
def test_wrong_arguments(name, argument, message):
    with pytest.raises(ValueError, match=message):
        load(name, argument)


@pytest.mark.parametrize("tokens", [1025, 65])
@pytest.mark.parametrize("mixer", mixer_names())
def test_vix_takes_every_mixer(mixer, tokens):
    for stem, position in (("linear", "learned"), ("conv_vix", "rope"), ("conv", "none")):
        config, _ = load("vix", f"mixer={mixer},stem={stem},position={position},tokens={tokens}")
        if position == "rope" and mixer in ("fnet", "mlp_mixer"):
            with pytest.raises(
                ValueError, match=f"config.model: the mixer '{mixer}' has no queries and keys"
            ):
                validate(config)
        else:
            validate(config)


@pytest.mark.parametrize(
    ("argument", "parameters"),
    [
        ("", 661_770),
        ("stem=conv_vix,position=rope", 623_306),
        ("mixer=linformer", 809_482),
        ("mixer=linformer,position=rope", 727_434),
        ("mixer=mlp_mixer", 8_533_002),
        ("mixer=nystromformer,tokens=65", 545_178),
    ],
)
def test_vix_has_the_sizes_of_the_authors(argument, parameters):
    config, _ = load("vix", argument)
    model = nnx.eval_shape(lambda: create_model(**config.model, num_classes=10, rngs=nnx.Rngs(0)))
    assert count_parameters(nnx.to_pure_dict(nnx.state(model, nnx.Param))) == parameters


def test_the_learning_rate_of_vix_is_constant():
    config, _ = load("vix")
    schedule = learning_rate_schedule(config, steps_per_epoch=390.6)
    assert {float(schedule(step)) for step in (0, 1, 5000, 15_000)} == {float(np.float32(1e-3))}
