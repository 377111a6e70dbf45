"""What a config may hold is checked, all of it, before anything is opened: what came, and what was expected."""

import json
import math
import re

import ml_collections
import pytest

from vir_jax.models.mixers import mixer_names, mixer_options
from vir_jax.runs.config import default_config, flatten
from vir_jax.runs.validate import FIELDS, validate
from vir_jax.training.optimizer import make_optimizer, optimizer_options


def small_config():
    """A config whose model is quickly made."""
    config = default_config()
    config.model.name, config.model.image_size = "vir_pico4", 8
    return config


def with_values(values):
    """A config with these values, of any type: a Python caller can put any in."""
    nested = small_config().to_dict()
    for field, value in values.items():
        *sections, key = field.split(".")
        section = nested
        for name in sections:
            section = section[name]
        section[key] = value
    return ml_collections.ConfigDict(nested, convert_dict=True, type_safe=False)


def test_every_field_has_a_kind():
    """But for those that mixers bring along, which they check themselves."""
    of_mixers = {f"model.{option}" for name in mixer_names() for option in mixer_options(name)}
    assert flatten(default_config()).keys() - of_mixers == FIELDS.keys() - of_mixers


def test_optimizers_are_those_that_can_be_made():
    config = default_config()
    for name in re.findall(r"'(\w+)'", FIELDS["optim.name"].expected):
        config.optim.name = name
        make_optimizer(**optimizer_options(config.optim))


def test_a_stored_config_is_as_valid():
    config = small_config()
    config.augment.crop, config.augment.crop_scale = "resized", (0.5, 1.0)
    validate(ml_collections.ConfigDict(json.loads(config.to_json())))  # Tuples are lists there.


# --- Values ---

# Put into every field. What is not said to be fine is refused, under the field's name.
ODD = [
    None,
    True,
    "x",
    "",
    "128",
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    1.5,
    (),
    (1,),
    (0.5, 0.5, 0.5, 0.5),
    b"x",
]
_TEXTS = ["data.dataset", "data.train_split", "data.eval_split"]
_FROM_0 = [
    "label_smoothing",
    "ema_decay",
    "model.drop_path_rate",
    "mixing.mixup_alpha",
    "mixing.cutmix_alpha",
]
_FROM_0 += ["augment.hflip", "augment.randaugment_ops", "augment.color_jitter", "augment.erase"]
_FROM_0 += [
    "optim.warmup_epochs",
    "optim.cooldown_epochs",
    "optim.weight_decay",
    "optim.clip_norm",
    "optim.final_lr",
]
_FLOATS = ["epochs", "model.layer_scale", "augment.color_jitter", "mixing.mixup_alpha", "mixing.cutmix_alpha"]
_FLOATS += ["model.norm_epsilon"]
_FLOATS += ["optim.lr", "optim.eps", "optim.weight_decay", "optim.clip_norm"]
_FLOATS += ["optim.warmup_epochs", "optim.cooldown_epochs"]
_OPTIONAL = ["data.data_dir", "model.mixer", "model.retention", "model.chunk_size", "model.implementation"]
_OPTIONAL += ["model.readout", "model.layer_scale", "model.mlp_dim", "model.levels", "model.channels"]
_OPTIONAL += ["model.mixtures", "model.local_context", "model.stem", "model.stem_stride", "model.readout_dim"]
FINE = [
    *((name, None) for name in _OPTIONAL),
    ("model.bidirectional", True),
    ("model.flips", True),
    ("bce_loss", True),
    *(
        (name, value)
        for name in [*_TEXTS, "data.data_dir", "init_from", "optim.freeze"]
        for value in ("x", "128")
    ),
    ("init_from", ""),
    ("evaluations", ()),
    *((name, "") for name in ("optim.freeze", "augment.transform", "writers", "profile")),
    *((name, -1) for name in ("mesh.fsdp", "mesh.tensor", "mesh.data")),
    *(
        (name, 0)
        for name in [
            *_FROM_0,
            "seed",
            "data.max_corrupt_fraction",
            "optim.b1",
            "optim.b2",
            "eval_every",
            "max_skipped_steps",
            "sample_images",
        ]
    ),
    *((name, 1.5) for name in _FLOATS),
]


@pytest.mark.parametrize("field", FIELDS)
def test_odd_values(field):
    # `create_model` checks the values of the model's, and says the option.
    named = "config.model" if field.startswith("model.") else f"config.{field}"
    for value in ODD:
        number = type(value) is int and isinstance(flatten(default_config())[field], float)
        values = {field: float(value) if number else value}  # As a config does by itself.
        if field in ("mesh.fsdp", "mesh.tensor"):
            values["mesh.data"] = 1
        config = with_values(values)
        # True == 1 and 0 == 0.0, so types are compared, too.
        fine = any((field, value) == pair and type(value) is type(pair[1]) for pair in FINE)
        if fine:
            validate(config)
            continue
        with pytest.raises(ValueError, match=re.escape(named)):
            validate(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": "128"}, "config.batch_size is '128'; expected a positive integer"),
        ({"epochs": math.inf}, "config.epochs is inf; expected a positive number, finite"),
        ({"seed": -1}, r"config.seed is -1; expected an integer in \[0, 4294967295\]"),
        ({"seed": 2**32}, "config.seed is 4294967296"),
        ({"ema_decay": 1.0}, r"config.ema_decay is 1.0; expected a number in \[0, 1\)"),
        ({"accumulation_steps": 3}, "config.accumulation_steps is 3; expected a divisor of batch_size=128"),
        ({"batch_size": 7, "mixing.mixup_alpha": 0.8}, "config.batch_size is 7; expected an even number"),
        ({"batch_size": 7, "mixing.cutmix_alpha": 0.8}, "config.batch_size is 7; expected an even number"),
        ({"augment.hflip": 2}, r"config.augment.hflip is 2; expected a number in \[0, 1\]"),
        ({"augment.crop": "center"}, "expected one of 'resized', 'pad', 'none'"),
        ({"augment.crop": "resized", "augment.crop_scale": (0.5, 1.5)}, "config.augment.crop_scale is"),
        ({"augment.crop": "resized", "augment.crop_scale": (0.5, 0.2)}, "with low <= high"),
        ({"augment.crop": "resized", "augment.crop_ratio": (0, 1)}, "each a positive number"),
        ({"augment.crop": "pad", "augment.crop_padding": 8}, "less than the image's shorter side, 8"),
        (
            {"augment.randaugment_ops": 2, "augment.randaugment_magnitude": 11},
            "config.augment.randaugment_magnitude",
        ),
        ({"augment.randaugment_ops": 2, "augment.color_jitter": 0.4}, "RandAugment takes its place"),
        ({"augment.interpolation": "nearest"}, "'bilinear', 'bicubic', 'random'"),
        (
            {"data.mean": (127.5, 127.5, 127.5)},
            r"config.data.mean is \(127.5.*expected 3 values, each a number in \[0, 1",
        ),
        ({"data.mean": (0.5,)}, r"config.data.mean is \(0.5,\); expected 3 values"),
        ({"data.std": (0.0, 0.5, 0.5)}, r"config.data.std is \(0.0"),
        ({"data.std": 0}, "config.data.std is 0; expected 3 values"),
        ({"data.std": (58.0, 57.0, 57.0)}, r"config.data.std is \(58.0"),
        ({"data.crop_fraction": 1.5}, r"expected a number in \(0, 1\]"),
        ({"data.crop_fraction": 0.0}, r"expected a number in \(0, 1\]"),
        ({"data.threads": 0}, "config.data.threads is 0; expected a positive integer"),
        ({"data.dataset": "folder"}, "config.data.data_dir is None; expected the folder that holds"),
        ({"optim.name": "adam"}, "config.optim.name is 'adam'; expected one of 'adamw', 'lamb'"),
        ({"optim.lr": -1.0}, "config.optim.lr is -1.0; expected a positive number"),
        ({"optim.b1": 1.0}, r"config.optim.b1 is 1.0; expected a number in \[0, 1\)"),
        ({"optim.eps": 0.0}, "config.optim.eps is 0.0; expected a positive number"),
        ({"optim.warmup_epochs": 10.0}, "config.optim.warmup_epochs is 10.0; expected less than epochs=10.0"),
        (
            {"optim.warmup_epochs": 1.0, "optim.warmup_lr": 0.1},
            "config.optim.warmup_lr is 0.1; expected at most",
        ),
        ({"optim.final_lr": 0.1}, "config.optim.final_lr is 0.1; expected at most the peak, optim.lr=0.001"),
        ({"mesh.fsdp": 0}, "config.mesh.fsdp is 0; expected a positive integer, or an integer equal to -1"),
        ({"mesh.fsdp": -1}, "one axis alone can be -1"),
        ({"log_every": 0}, "config.log_every is 0; expected a positive integer"),
        ({"log_every": True}, "config.log_every is True; expected a positive integer"),
        (
            {"model.image_size": (8, 8, 8)},
            r"config.model.image_size is \(8, 8, 8\); expected an integer, or 2 values",
        ),
        (
            {"model.dtype": "float16"},
            "config.model.dtype is 'float16'; expected one of 'float32', 'bfloat16'",
        ),
    ],
)
def test_what_is_said_of_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        validate(with_values(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "vir_b17x"}, "config.model: no model is called 'vir_b17x'"),
        ({"mode": "sideways"}, "config.model.mode='sideways'; expected one of"),
        ({"remat": "dots"}, "config.model.remat='dots'; expected one of"),
        ({"position": "axial"}, "config.model.position='axial'; expected"),
        ({"readout": "middle"}, "config.model.readout='middle'; expected"),
        ({"retention": "3d"}, "config.model.retention='3d'; expected"),
        ({"implementation": "triton"}, "config.model.implementation='triton'; expected"),
        ({"drop_path_rate": 1.0}, "config.model.drop_path_rate=1.0; expected"),
        ({"layer_scale": 0.0}, "config.model.layer_scale=0.0; expected a positive number"),
        ({"layer_scale": -1e-5}, "config.model.layer_scale=-1e-05; expected a positive number"),
        ({"chunk_size": 0}, "config.model.*chunk_size"),
        ({"image_size": 0}, "config.model.*image_size=0"),
        ({"image_size": -8}, "config.model.*image_size=-8"),
        (
            {"image_size": 10},
            "config.model: an image of 10 x 10 pixels does not divide into patches of 4 x 4",
        ),
        ({"mode": "parallel", "implementation": "pallas_tpu"}, "config.model.*mode"),
        ({"retention": "2d", "chunk_size": 8}, "config.model.chunk_size=8 makes no sense with"),
        ({"name": "vit_pico4", "retention": "1d"}, "config.model.*retention"),
        ({"name": "vit_pico4", "bidirectional": True}, "config.model.*bidirectional=True"),
        ({"name": "vit_pico4", "mode": "recurrent"}, "config.model.mode='recurrent'; expected one of"),
    ],
)
def test_options_of_the_model_are_checked_by_making_it(values, message):
    with pytest.raises(ValueError, match=message):
        validate(with_values({f"model.{name}": value for name, value in values.items()}))


@pytest.mark.parametrize(
    ("values", "unused"),
    [
        ({"augment.crop_scale": (0.5, 1.0)}, "augment.crop_scale"),
        (
            {"augment.crop": "pad", "augment.crop_padding": 2, "augment.crop_ratio": (1.0, 1.0)},
            "augment.crop_ratio",
        ),
        ({"augment.crop_padding": 2}, "augment.crop_padding"),
        ({"augment.randaugment_magnitude": 5.0}, "augment.randaugment_magnitude"),
        ({"augment.randaugment_std": 0.0}, "augment.randaugment_std"),
        ({"augment.interpolation": "bicubic"}, "augment.interpolation"),
        ({"mixing.switch_probability": 0.1, "mixing.mixup_alpha": 0.8}, "mixing.switch_probability"),
        ({"optim.warmup_lr": 1e-5}, "optim.warmup_lr"),
        ({"data.dataset": "digits", "data.data_dir": "/data"}, "data.data_dir"),
        ({"model.mode": "parallel", "model.chunk_size": 4}, "model.chunk_size"),
    ],
)
def test_what_is_not_used_is_an_error(values, unused):
    with pytest.raises(
        ValueError, match=rf"config\.{unused} is .*, and nothing reads it: .*Leave it at its default"
    ):
        validate(with_values(values))


@pytest.mark.parametrize(
    "values",
    [
        {"augment.crop": "resized", "augment.crop_scale": (0.5, 1.0), "augment.interpolation": "bicubic"},
        {"augment.randaugment_ops": 1, "augment.randaugment_std": 0.0, "augment.interpolation": "bicubic"},
        {"mixing.mixup_alpha": 0.8, "mixing.cutmix_alpha": 1.0, "mixing.switch_probability": 0.1},
        {"optim.warmup_epochs": 1.0, "optim.warmup_lr": 1e-5},
        {"optim.lr": 1e-9, "optim.final_lr": 1e-9},  # Below warmup_lr, which nothing reads.
        {"model.mode": "chunkwise", "model.chunk_size": 4},
        {"model.image_size": (8, 16), "model.layer_scale": 1.0},
    ],
)
def test_what_is_used_is_none(values):
    validate(with_values(values))


# --- Names ---


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("modle.name", "model.name"),
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("model.drop_path", "model.drop_path_rate"),
    ],
)
def test_unknown_fields_are_refused_with_the_nearest(name, near):
    nested = small_config().to_dict()
    section, _, key = name.rpartition(".")
    (nested.setdefault(section, {}) if section else nested)[key] = 1
    with pytest.raises(ValueError, match=f"config has no field '{name}'; did you mean '{near}'"):
        validate(ml_collections.ConfigDict(nested))


def test_missing_fields_are_named():
    nested = small_config().to_dict()
    del nested["optim"]["b1"]
    with pytest.raises(ValueError, match=r"config\.optim\.b1 is missing; expected a number in \[0, 1\)"):
        validate(ml_collections.ConfigDict(nested))
