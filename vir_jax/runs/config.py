"""The configuration of a run: every field, its default, its meaning and what it may hold, in one place.

A recipe in `configs/` starts from `default_config()` and sets what differs. The configuration is locked, so a misspelt
field is an error that names the nearest one; `validate` checks all of it before anything is opened or compiled.
"""

import ast
import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
from flax import nnx
from ml_collections import config_dict

from vir_jax.imports import load_file, load_object
from vir_jax.models import create_model, model_options
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


class Config(ml_collections.ConfigDict):
    """A ConfigDict that answers any unknown field with the nearest one it has, however far off."""

    def _generate_did_you_mean_message(self, request: str, message: str = "") -> str:
        # ml_collections asks this for every lookup that fails; its own version gives up early, and prints all values.
        return f'no field "{request}". Did you mean "{nearest(request, [*self.keys(), *flatten(self)])}"?'


def default_config() -> ml_collections.ConfigDict:
    """Return a config in which whatever can be switched off is off: no augmentation, mixing, smoothing or average."""

    def may_be_none(value: Any = None) -> config_dict.FieldReference:
        # Typed by `validate` alone, so that None can be given on the command line.
        return config_dict.FieldReference(value, field_type=object)

    config = Config()
    config.seed = 0  # Parameters, shuffling, augmentation and drop path all derive from (seed, step).
    config.epochs = 10.0  # Passes over the training data, warm-up included, cool-down not.
    config.batch_size = 128  # Examples per optimiser step, over all devices and processes.
    config.accumulation_steps = 1  # Slices a batch is computed in, one after another; divides batch_size.
    config.reduce_dtype = "float32"  # Of gradients as the mesh's data axis sums them; "bfloat16" sends half.
    config.label_smoothing = 0.0  # Probability mass spread evenly over all classes.
    config.bce_loss = False  # Of classes each by itself: binary cross-entropy in place of the softmax's.
    config.ema_decay = 0.0  # Of the moving average of the parameters; 0 keeps none.
    config.task = "classification"  # What is learned: a module of vir_jax.tasks, or "package.module:Class".
    config.init_from = ""  # Workdir of a finished run whose weights this one starts from (fine-tuning).

    config.model = model = Config()  # The keywords of `vir_jax.models.create_model`, which explains them.
    model.name = "vir_s16"  # {vir|vit|cvir}_{size}{patch}; vir_jax.models lists the sizes.
    model.image_size = may_be_none(224)  # Pixels, a square's side or (height, width). Never None.
    # Embedding of patches: "linear", "conv" or "conv_vix"; or "pixels", to predict the next. None: the family's.
    model.stem = may_be_none()
    model.mixer = may_be_none()  # Token mixer by name; None: softmax for vit_*, else retention.
    model.mlp_dim = may_be_none()  # Hidden units of the MLP; None: 4 to a channel, 2 for the size vix.
    model.retention = may_be_none()  # "1d" (raster order) or "2d"; None: "1d". ViR only.
    model.chunk_size = may_be_none()  # Tokens per chunk of 1-D retention; None: what was measured to be best.
    model.implementation = may_be_none()  # Of 1-D retention: "xla", "mosaic_gpu", "pallas_tpu"; None: "xla".
    model.levels = may_be_none()  # Of a channel, in models of pixels.
    model.channels = may_be_none()  # 1 (grey: the average of RGB) or 3; None: 3, in models of pixels 1.
    model.mixtures = may_be_none()  # Logistics that a pixel's distribution is mixed of; None: categorical.
    model.local_context = (
        may_be_none()
    )  # In models of pixels, how far a token sees earlier ones; None: the last.
    model.readout = may_be_none()  # What the head reads; None: the class token.
    model.position = "learned"  # "learned", "sincos", "rope", "rope_2d" or "none".
    # The next five are retention's; None is what the family has: in cvir_* a short_conv of 4.
    model.decays = may_be_none()  # "vir", "retnet", "none", "learned" or "token"; None: "vir".
    model.qk_norm = may_be_none()  # Of queries and keys per head: "rms" or "layer"; None: none.
    model.head_norm = may_be_none()  # True: each head's output is divided by its root mean square.
    model.gate = may_be_none()  # True: each head's output is multiplied by swish(gate(x)).
    model.short_conv = may_be_none()  # Width of a causal convolution of tokens before the mixer; None: none.
    model.bidirectional = False  # Read the patches forwards, then backwards; 1-D ViR only.
    model.flips = False  # Read the patches backwards in every second block; ViR only.
    model.layer_scale = may_be_none()  # Initial LayerScale, 1e-5 in the ViR recipes; None: no LayerScale.
    model.norm_epsilon = 1e-6  # What layer norms add to the variance; transformers' ViTs have 1e-12.
    model.drop_path_rate = 0.0  # Stochastic depth of the last block; rises linearly over the blocks.
    model.remat = "elementwise"  # What to compute anew in the backward pass: "none", "elementwise" or "full".
    model.dtype = "float32"  # Of the computation, or "bfloat16"; parameters and states are float32 always.
    model.mode = "auto"  # Form of the mixer in training: auto, parallel, recurrent or chunkwise.
    for option in model_options().keys() - model.keys():
        model[option] = may_be_none()  # Of one mixer, which explains it; None: its default.

    config.data = data = Config()
    data.dataset = (
        "imagenet2012"  # A TFDS name, "folder" (one per class), "table", "hf:user/set" or "digits".
    )
    data.data_dir = (
        may_be_none()
    )  # None: TFDS's own default directory. Required by "folder", "table" and "hf".
    data.train_split = "train"
    data.eval_split = "validation"
    data.threads = 16  # Decoding threads of each process.
    data.mean = (
        0.5,
        0.5,
        0.5,
    )  # Of the colours in [0, 1]; taken away on the device. One where channels is 1.
    data.std = (0.5, 0.5, 0.5)
    data.crop_fraction = 1.0  # Part of the resized image's short side that evaluation crops.
    data.background = (255, 255, 255)  # RGB that shows where an image is transparent: white.
    # Of the examples of a split, each counted once, this fraction may be corrupt, in training and in evaluation; of
    # fewer than 1,000 as many as of 1,000 (here 10), and with 0 none. Looked at before step 1, of a larger split in a
    # sample of 1,000, and again as it is read.
    data.max_corrupt_fraction = 0.01

    # Further sets to evaluate on besides data.eval_split, each {"name": ..., and what differs: "dataset", "split",
    # "data_dir", "classes"}; `vir_jax.runs.evaluation_sets` explains them.
    config.evaluations = ()

    config.augment = augment = Config()  # vir_jax.data.AugmentConfig explains the fields.
    augment.crop = (
        "none"  # "resized": a random box, resized; "pad": a random window of the padded image; "none".
    )
    augment.crop_scale = (0.08, 1.0)  # Area of the random box, as a fraction of the image's.
    augment.crop_ratio = (3 / 4, 4 / 3)  # Width over height of the random box.
    augment.crop_padding = 4  # Pixels of black border, for crop "pad".
    augment.interpolation = (
        "random"  # Of crop "resized" and RandAugment: "bilinear", "bicubic", or one each time.
    )
    augment.hflip = 0.0  # Probability of a horizontal flip.
    augment.randaugment_ops = 0  # Operations per image; 0 switches RandAugment off.
    augment.randaugment_magnitude = 9.0  # Mean strength, 0 to 10.
    augment.randaugment_std = 0.5  # Standard deviation of the strength.
    augment.color_jitter = 0.0  # Strength; 0 switches it off. RandAugment takes its place.
    augment.erase = 0.0  # Probability that a rectangle is replaced by noise.
    augment.transform = ""  # A function of your own, "package.module:function", of (image, rng); done last.

    config.mixing = mixing = Config()
    mixing.mixup_alpha = 0.0  # Of the Beta distribution of mixup's weight; 0 turns mixup off.
    mixing.cutmix_alpha = 0.0  # The same for cutmix.
    mixing.switch_probability = 0.5  # Of cutmix instead of mixup where both are on.

    config.optim = optim = Config()
    optim.name = "adamw"  # "adamw", "lamb", "lion", "muon", "adafactor" or "sgd".
    optim.lr = 1e-3  # Peak learning rate, absolute (not scaled by the batch).
    optim.warmup_lr = 1e-6  # Learning rate of the first step.
    optim.final_lr = 0.0  # At the end of the cosine, and during cool-down.
    optim.warmup_epochs = 0.0
    optim.cooldown_epochs = 0.0  # At final_lr, after `epochs`.
    optim.weight_decay = 0.0  # On kernels only: no bias, norm, embedding, class token or LayerScale.
    optim.b1 = 0.9  # Of the moving average of gradients; of sgd and adafactor the momentum.
    optim.b2 = 0.999  # Of the moving average of their squares; lion wants 0.99. Not of sgd and adafactor.
    optim.eps = 1e-8  # Of adamw, lamb and muon.
    optim.layer_decay = (
        1.0  # Learning rate of a layer over that of the next, from the head down; 1: the same.
    )
    optim.freeze = ""  # Parameters that stay as they are: names, with * for anything, separated by commas.
    optim.clip_norm = 0.0  # Global norm that gradients are clipped to; 0 turns clipping off.

    config.mesh = mesh = Config()
    mesh.data = -1  # Devices over which the batch alone is split; -1 takes all that are left.
    mesh.fsdp = 1  # Devices over which batch, parameters and optimiser state are split.
    mesh.tensor = 1  # Devices over which heads and hidden units are split.

    config.log_every = 100  # Steps between two lines of metrics.
    config.eval_every = 0  # Steps between two evaluations, of which "best" is chosen; 0: at the end only.
    config.eval_batch_size = 1024  # Examples per evaluation step, over all devices and processes.
    config.max_skipped_steps = 0  # Non-finite steps that the whole run may leave out before it stops.
    config.checkpoint_every = 1000  # Steps between two checkpoints; the last step is always saved.
    config.keep_checkpoints = 2  # Newest ones kept; the best one is kept besides.
    config.writers = (
        "tensorboard"  # Besides metrics.jsonl: of tensorboard, wandb, mlflow, trackio; "a,b" for two.
    )
    config.sample_images = 0  # Images that a model of pixels draws after each evaluation, for the writers.
    config.profile = (
        ""  # Steps that JAX's profiler watches, as "10:20"; the trace is written to workdir/profile.
    )
    config.lock()
    return config


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
    "model.position": text(),
    "model.bidirectional": truth(),
    "model.flips": truth(),
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
        config.data.dataset != "digits",
        "data.dataset is 'digits', which ship with scikit-learn",
    )
    chunks = model.mode in ("auto", "chunkwise")
    yield "model.chunk_size", chunks, f"model.mode is {model.mode!r}, which has no chunks"


def load_beside(file: str, name: str) -> ModuleType:
    """Return the module `name`.py of a recipe's own folder, whatever the working directory and Python's path are.

    Args:
        file: the recipe's `__file__`.
        name: of the module.

    Raises:
        FileNotFoundError: there is none.
    """
    return load_file(Path(file).resolve().with_name(f"{name}.py"))


def parse_arguments(argument: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Parse the text after the colon of `--config=configs/x.py:name=value,...`.

    Args:
        argument: comma-separated `name=value` pairs; None or empty for none.
        **defaults: the names that the recipe knows, with default values that also fix their types.

    Raises:
        ValueError: a pair without `=`, an unknown name (the nearest is named), a name given twice, or a value of a type
            that is not the default's.
    """
    values = dict(defaults)
    given: set[str] = set()
    for pair in filter(None, (argument or "").split(",")):
        name, equals, written = pair.partition("=")
        if not equals:
            raise ValueError(f"config argument {pair!r} is not of the form name=value")
        if name not in defaults:
            hint = f"did you mean {nearest(name, defaults)!r}?" if defaults else "this config takes none"
            raise ValueError(f"unknown config argument {name!r}; {hint} (known: {sorted(defaults)})")
        if name in given:
            raise ValueError(f"config argument {name!r} is given twice")
        given.add(name)
        values[name] = _parse_value(name, written, defaults[name])
    return ml_collections.ConfigDict(values)


def _parse_value(name: str, written: str, default: Any) -> Any:
    if isinstance(default, str):
        return written
    try:
        value = ast.literal_eval(written)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"config argument {name}={written!r} is no Python value") from error
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"config argument {name}={written!r} should be of type {type(default).__name__}")
    return value


def nearest(name: str, known: Collection[str]) -> str:
    """Return the known name that one probably meant; one of another section with the same last part comes first."""
    same = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    return difflib.get_close_matches(name, same or list(known), n=1, cutoff=0.0)[0]


def flatten(tree: Mapping[str, Any] | ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested sections by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping | ml_collections.ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
