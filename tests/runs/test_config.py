"""The fields of a config: those of what they describe, by one spelling, from Python and from the command line."""

import copy
import dataclasses
import inspect

import pytest
from absl import flags
from ml_collections import config_flags

from tests.test_configs import FOLDER
from vir_jax.data import AugmentConfig
from vir_jax.models import create_model
from vir_jax.models.mixers import mixer_names, mixer_options
from vir_jax.runs.config import default_config, flatten, parse_arguments
from vir_jax.runs.validate import validate

# How ml_collections loads a recipe.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_model_fields_are_the_keywords_of_create_model():
    keywords = {
        p.name for p in inspect.signature(create_model).parameters.values() if p.kind != p.VAR_KEYWORD
    }
    of_mixers = {option for name in mixer_names() for option in mixer_options(name)}
    assert set(default_config().model) == (keywords - {"num_classes", "rngs"}) | of_mixers


def test_augment_fields_are_those_of_the_loaders():
    config = default_config()
    ours = {**config.augment, "mean": config.data.mean, "std": config.data.std}
    assert ours == dataclasses.asdict(AugmentConfig())


def test_by_default_all_is_off():
    config = default_config()
    validate(config)
    off = [
        "label_smoothing",
        "ema_decay",
        "mixing.mixup_alpha",
        "mixing.cutmix_alpha",
        "model.drop_path_rate",
    ]
    off += ["augment.hflip", "augment.randaugment_ops", "augment.color_jitter", "augment.erase"]
    off += ["optim.weight_decay", "optim.clip_norm", "optim.warmup_epochs", "optim.cooldown_epochs"]
    assert {name: flatten(config)[name] for name in off} == dict.fromkeys(off, 0)
    assert (config.augment.crop, config.model.layer_scale) == ("none", None)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("optim.weigth_decay", "weight_decay"),
        ("modle.name", "model"),
        ("optimizer.lr", "optim"),
        ("lr", "optim.lr"),
        ("mixing.mixup", "mixup_alpha"),
        ("model.dropout_path", "drop_path_rate"),
    ],
)
def test_python_and_the_command_line_name_the_nearest_field(path, near):
    config = default_config()
    *sections, key = path.split(".")

    def set_field():
        section = config
        for name in sections:
            section = getattr(section, name)
        setattr(section, key, 1)

    with pytest.raises(AttributeError, match=f'Did you mean "{near}"'):
        set_field()
    with pytest.raises((AttributeError, KeyError), match=f'Did you mean "{near}"'):
        from_command_line(f"--config.{path}=1")


# --- The command line ---


def from_command_line(*arguments):
    argv = ["train.py", f"--config={FOLDER / 'vir_digits.py'}", *arguments]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return holder.value


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("model.layer_scale=1e-4", 1e-4),
        ("model.layer_scale=None", None),
        ("model.chunk_size=16", 16),
        ("model.image_size=16", 16),
        ("model.image_size=16,32", (16, 32)),
        ("model.retention=2d", "2d"),
        ("model.decays=token", "token"),
        ("model.gate=True", True),
        ("model.short_conv=4", 4),
        ("model.flips=True", True),
        ("model.readout=None", None),
        ("model.remat=full", "full"),
        ("mixing.mixup_alpha=0", 0.0),
        ("epochs=30", 30.0),
    ],
)
def test_fields_on_the_command_line(argument, value):
    config = from_command_line(f"--config.{argument}")
    validate(config)
    found = flatten(config)[argument.partition("=")[0]]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.image_size=abc", "config.model.image_size is 'abc'; expected an integer, or 2 values"),
        ("model.layer_scale=abc", "config.model.layer_scale is 'abc'; expected a finite number, or None"),
        ("model.chunk_size=1.5", "config.model.chunk_size is 1.5; expected an integer, or None"),
        ("epochs=inf", "config.epochs is inf"),
        ("epochs=nan", "config.epochs is nan"),
        ("data.mean=0.5", "config.data.mean is .*; expected 3 values"),
        ("mesh.data=0", "config.mesh.data is 0"),
    ],
)
def test_bad_values_on_the_command_line(argument, message):
    with pytest.raises(ValueError, match=message):
        validate(from_command_line(f"--config.{argument}"))


def test_a_copy_has_the_same_fields():
    """Of a config whose fields that may be None are references."""
    config = default_config()
    copied = copy.deepcopy(config)
    copied.model.layer_scale = 1e-5
    assert config.model.layer_scale is None
    resolved = config.copy_and_resolve_references()
    assert flatten(resolved) == flatten(config)
    with pytest.raises(AttributeError, match='Did you mean "lr"'):
        resolved.optim.lrr = 1.0


# --- Arguments of recipes ---


def test_arguments_are_typed():
    values = parse_arguments("epochs=3,model=vit_pico1,flag=True", epochs=1.0, model="vir_pico1", flag=False)
    assert values.to_dict() == {"epochs": 3.0, "model": "vit_pico1", "flag": True}
    assert parse_arguments(None, epochs=1.0).epochs == 1.0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("epoch=3", "unknown config argument 'epoch'; did you mean 'epochs'"),
        ("x=3", "unknown config argument 'x'; did you mean '(epochs|steps)'"),
        ("epochs", "not of the form name=value"),
        ("epochs=many", "no Python value"),
        ("epochs=3,epochs=4", "'epochs' is given twice"),
        ("steps=1.5", "should be of type int"),
        ("steps=True", "should be of type int"),
    ],
)
def test_bad_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(argument, epochs=1.0, steps=1)


def test_a_recipe_without_arguments_says_so():
    with pytest.raises(ValueError, match="unknown config argument 'epochs'; this config takes none"):
        parse_arguments("epochs=3")
