"""What each field of a config may hold, and what they say together: checked before anything is opened or compiled."""

import re
from collections.abc import Iterator

import ml_collections
from flax import nnx

from vir_jax.imports import load_object
from vir_jax.models import create_model
from vir_jax.runs.config import default_config, flatten, nearest
from vir_jax.runs.evaluation_sets import named_sets
from vir_jax.runs.fields import (
    either,
    integer,
    interval,
    names_of,
    number,
    one_of,
    optional,
    sequence,
    several,
    steps,
    text,
    truth,
)
from vir_jax.tasks import check_fields, make_task

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("b1", "b2", "eps"),
    "lamb": ("b1", "b2", "eps"),
    "lion": ("b1", "b2"),
    "muon": ("b1", "b2", "eps"),
    "adafactor": ("b1",),
    "sgd": ("b1",),
}
"""What each optimiser reads of `config.optim`, besides what all of them do."""

_AXIS = either(integer(1), integer(-1, -1))
FIELDS = {
    "seed": integer(0, 2**32 - 1),  # JAX takes no more bits than these into a key, in silence.
    "task": text(),
    "epochs": number(0, ends="()"),
    "batch_size": integer(1),
    "accumulation_steps": integer(1),
    "reduce_dtype": one_of("float32", "bfloat16"),
    "label_smoothing": number(0, 1, "[)"),
    "bce_loss": truth(),
    "ema_decay": number(0, 1, "[)"),
    "init_from": either(text(), one_of("")),
    # Types alone: `create_model` knows the values.
    "model.name": text(),
    "model.image_size": either(integer(), sequence(2, integer())),
    "model.stem": optional(text()),
    "model.mixer": optional(text()),
    "model.mlp_dim": optional(integer()),
    "model.retention": optional(text()),
    "model.chunk_size": optional(integer()),
    "model.implementation": optional(text()),
    "model.levels": optional(integer()),
    "model.channels": optional(integer()),
    "model.mixtures": optional(integer()),
    "model.local_context": optional(integer()),
    "model.readout": optional(text()),
    "model.readout_dim": optional(integer()),
    "model.position": text(),
    "model.bidirectional": truth(),
    "model.flips": truth(),
    "model.late_attention": truth(),
    "model.stem_stride": optional(integer()),
    "model.layer_scale": optional(number()),
    "model.norm_epsilon": number(),
    "model.drop_path_rate": number(),
    "model.remat": text(),
    "model.dtype": one_of("float32", "bfloat16"),  # float16 would need its loss scaled.
    "model.mode": text(),
    "data.dataset": text(),
    "data.data_dir": optional(text()),
    "data.train_split": text(),
    "data.eval_split": text(),
    "data.threads": integer(1),
    "data.mean": either(sequence(3, number(0, 1)), sequence(1, number(0, 1))),
    "data.std": either(sequence(3, number(1 / 255, 1)), sequence(1, number(1 / 255, 1))),
    "data.crop_fraction": number(0, 1, "(]"),
    "data.background": sequence(3, integer(0, 255)),
    "data.max_corrupt_fraction": number(0, 1),
    "evaluations": several(),
    "augment.crop": one_of("resized", "pad", "none"),
    "augment.crop_scale": interval(number(0, 1, "(]")),
    "augment.crop_ratio": interval(number(0, ends="()")),
    "augment.crop_padding": integer(0),
    "augment.interpolation": one_of("bilinear", "bicubic", "random"),
    "augment.hflip": number(0, 1),
    "augment.randaugment_ops": integer(0),
    "augment.randaugment_magnitude": number(0, 10),
    "augment.randaugment_std": number(0),
    "augment.color_jitter": number(0),
    "augment.erase": number(0, 1),
    "augment.transform": either(text(), one_of("")),
    "mixing.mixup_alpha": number(0),
    "mixing.cutmix_alpha": number(0),
    "mixing.switch_probability": number(0, 1),
    "optim.name": one_of(*OPTIMIZERS),
    "optim.lr": number(0, ends="()"),
    "optim.warmup_lr": number(0),
    "optim.final_lr": number(0),
    "optim.warmup_epochs": number(0),
    "optim.cooldown_epochs": number(0),
    "optim.weight_decay": number(0),
    "optim.b1": number(0, 1, "[)"),
    "optim.b2": number(0, 1, "[)"),
    "optim.eps": number(0, ends="()"),
    "optim.layer_decay": number(0, 1, "(]"),
    "optim.freeze": either(text(), one_of("")),
    "optim.clip_norm": number(0),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "log_every": integer(1),
    "eval_every": integer(0),
    "eval_batch_size": integer(1),
    "max_skipped_steps": integer(0),
    "checkpoint_every": integer(1),
    "keep_checkpoints": integer(1),
    "writers": names_of("tensorboard", "wandb", "mlflow", "trackio"),
    "sample_images": integer(0),
    "profile": steps(),
}
"""By dotted name, what each field may hold; options of single mixers are checked by the mixers."""


def validate(config: ml_collections.ConfigDict) -> None:
    """Check a whole config: its fields, their types and ranges, what they say together, and the model.

    Nothing is opened, allocated or compiled.

    Raises:
        ValueError: naming the field, its value and what it should be.
    """
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in flatten(config).items()
    }
    defaults = flatten(default_config())
    for name in values:
        if name not in defaults:
            raise ValueError(f"config has no field {name!r}; did you mean {nearest(name, defaults)!r}?")
    for name, kind in FIELDS.items():
        if name not in values:
            raise ValueError(
                f"config.{name} is missing; expected {kind.expected}, as `default_config` has it"
            )
        if not kind.accepts(values[name]):
            raise ValueError(f"config.{name} is {values[name]!r}; expected {kind.expected}")
    named_sets(config)
    check_fields(config)
    for name, ok, expected in _together(config):
        if not ok:
            raise ValueError(f"config.{name} is {values[name]!r}; expected {expected}")
    for name, used, switch in _switches(config):
        if not used and values[name] != defaults[name]:
            raise ValueError(
                f"config.{name} is {values[name]!r}, and nothing reads it: {switch}. Leave it at its default,"
                f" {defaults[name]!r}, or change that"
            )
    try:
        nnx.eval_shape(lambda: create_model(**config.model, num_classes=2, rngs=nnx.Rngs(0)))
    except ValueError as error:
        option = re.match(r"\w+=", str(error))  # "mode='serial'; expected ...", as most of them begin
        raise ValueError(f"config.model{'.' if option else ': '}{error}") from error
    make_task(config, ("one class", "another"))
    if config.augment.transform:
        load_object(config.augment.transform, "config.augment.transform")


def _together(config: ml_collections.ConfigDict) -> Iterator[tuple[str, bool, str]]:
    """Yield what fields must be to agree with others: (field, whether it does, what is expected)."""
    batch_size, slices = config.batch_size, config.accumulation_steps
    yield "accumulation_steps", batch_size % slices == 0, f"a divisor of batch_size={batch_size}"
    mixes = config.mixing.mixup_alpha > 0 or config.mixing.cutmix_alpha > 0
    yield "batch_size", not mixes or batch_size % 2 == 0, "an even number, as mixup and cutmix mix pairs"

    optim, epochs = config.optim, config.epochs
    yield "optim.warmup_epochs", optim.warmup_epochs < epochs, f"less than epochs={epochs}"
    rises = optim.warmup_epochs == 0 or optim.warmup_lr <= optim.lr
    yield "optim.warmup_lr", rises, f"at most the peak, optim.lr={optim.lr}"
    yield "optim.final_lr", optim.final_lr <= optim.lr, f"at most the peak, optim.lr={optim.lr}"

    data, augment = config.data, config.augment
    for dataset, holds in {
        "folder": "<split>/<class name>/",
        "table": "<split>.csv or <split>.parquet",
        "hf": "what save_to_disk wrote",
    }.items():
        given = data.dataset != dataset or data.data_dir is not None
        yield "data.data_dir", given, f"the folder that holds {holds}"
    jitters = augment.color_jitter == 0 or augment.randaugment_ops == 0
    yield (
        "augment.color_jitter",
        jitters,
        "0 where augment.randaugment_ops is not: RandAugment takes its place",
    )
    patches, channels = config.model.stem != "pixels", config.model.channels
    rgb_or_grey = not patches or channels in (None, 1, 3)
    yield "model.channels", rgb_or_grey, "1 or 3: images are read as RGB, whatever a file has besides"
    values, said = (
        (1, "1 value: the model is of grey images") if patches and channels == 1 else (3, "3 values")
    )
    for name in ("mean", "std"):
        yield f"data.{name}", len(data[name]) == values, said
    size = config.model.image_size
    side = size if isinstance(size, int) else min(size)
    shifts = augment.crop != "pad" or augment.crop_padding < side
    yield (
        "augment.crop_padding",
        shifts,
        f"less than the image's shorter side, {side}: a crop could miss all of it",
    )

    axes = list(config.mesh.values())
    yield (
        "mesh.data",
        axes.count(-1) <= 1,
        "a number: one axis alone can be -1, and take the devices left over",
    )


def _switches(config: ml_collections.ConfigDict) -> Iterator[tuple[str, bool, str]]:
    """Yield which fields are read only where another says so: (field, whether it is, what that other says)."""
    augment, mixing, optim, model = config.augment, config.mixing, config.optim, config.model
    for name in ("crop_scale", "crop_ratio"):
        yield f"augment.{name}", augment.crop == "resized", f"augment.crop is {augment.crop!r}, not 'resized'"
    yield "augment.crop_padding", augment.crop == "pad", f"augment.crop is {augment.crop!r}, not 'pad'"
    randaugment = augment.randaugment_ops > 0
    for name in ("randaugment_magnitude", "randaugment_std"):
        yield f"augment.{name}", randaugment, "augment.randaugment_ops is 0"
    interpolates = augment.crop == "resized" or randaugment
    yield (
        "augment.interpolation",
        interpolates,
        "augment.crop is not 'resized' and augment.randaugment_ops is 0",
    )
    yield "sample_images", config.task == "pixels", f"config.task is {config.task!r}, which draws nothing"
    both = mixing.mixup_alpha > 0 and mixing.cutmix_alpha > 0
    yield "mixing.switch_probability", both, "mixing.mixup_alpha and mixing.cutmix_alpha are not both on"
    for name in ("b1", "b2", "eps"):
        yield f"optim.{name}", name in OPTIMIZERS[optim.name], f"optim.name is {optim.name!r}"
    yield "optim.warmup_lr", optim.warmup_epochs > 0, "optim.warmup_epochs is 0"
    yield (
        "data.data_dir",
        config.data.dataset not in ("digits", "digits_scenes"),
        f"data.dataset is {config.data.dataset!r}, and the digits ship with scikit-learn",
    )
    chunks = model.mode in ("auto", "chunkwise")
    yield "model.chunk_size", chunks, f"model.mode is {model.mode!r}, which has no chunks"
