"""The configuration of a run: every field, its default and its meaning, in one place.

A recipe in `configs/` starts from `default_config()` and changes what differs. The configuration is
locked, so a misspelt field is an error that names the nearest one.
"""

import ast
import difflib
from typing import Any

import ml_collections
from ml_collections import config_dict


def default_config() -> ml_collections.ConfigDict:
    """The recipe of `configs/vir_b.py`: ViR-B on ImageNet (PAPER.md section 4)."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # Parameters, shuffling, augmentation and drop path all derive from (seed, step).
    config.epochs = 310.0  # Passes over the training data, warm-up included, cool-down not.
    config.batch_size = 4096  # Examples per optimiser step, over all devices and processes.
    config.accumulation_steps = 1  # Slices a batch is computed in, one after another; divides batch_size.
    config.label_smoothing = 0.1  # Probability mass spread evenly over all classes.
    config.ema_decay = 0.9998  # Of the moving average of the parameters; 0 keeps none.
    config.task = "classification"  # What is learned: a module of vir_jax.tasks, or "package.module:Class".
    config.init_from = ""  # Workdir of a finished run whose weights this one starts from (fine-tuning).

    config.model = model = ml_collections.ConfigDict()
    model.name = "vir_b16"  # {vir|vit}_{size}{patch}; vir_jax.models lists the sizes.
    model.image_size = (224, 224)  # Pixels, (height, width); one number for a square.
    model.retention = config_dict.placeholder(str)  # "1d" (raster order) or "2d"; None: "1d". ViR only.
    model.readout = config_dict.placeholder(str)  # "last", "average", "first"; None: the family's own.
    model.position = "learned"  # Position embeddings: "learned" or "sincos".
    model.bidirectional = False  # Read the patches forwards, then backwards; 1-D ViR only.
    model.drop_path = 0.2  # Stochastic depth of the last block; rises linearly over the blocks.
    model.remat = False  # Keep a block's input alone for the backward pass: less memory, a third more work.
    model.dtype = "bfloat16"  # Of the computation. Parameters, decays and states are float32 always.
    model.mode = "auto"  # Form of retention in training: auto, parallel, recurrent or chunkwise.
    model.implementation = config_dict.placeholder(str)  # Of retention: "xla", "mosaic_gpu", "pallas_tpu".

    config.data = data = ml_collections.ConfigDict()
    data.dataset = "imagenet2012"  # A TFDS name, "folder" (one folder per class) or "digits".
    data.data_dir = config_dict.placeholder(str)  # None: TFDS's own default directory.
    data.train_split = "train"
    data.eval_split = "validation"
    data.threads = 16  # Decoding threads of each process.
    data.mean = (0.485, 0.456, 0.406)  # Of the colours in [0, 1]; taken away on the device.
    data.std = (0.229, 0.224, 0.225)
    data.crop_fraction = 0.875  # Part of the resized image's short side that evaluation crops.

    config.augment = augment = ml_collections.ConfigDict()  # vir_jax.data.AugmentConfig explains the fields.
    augment.crop = "resized"  # A random box, resized; "pad": a random window of the padded image; "none".
    augment.crop_scale = (0.08, 1.0)  # Area of the random box, as a fraction of the image's.
    augment.crop_ratio = (3 / 4, 4 / 3)  # Width over height of the random box.
    augment.crop_padding = 4  # Pixels of black border, for crop "pad".
    augment.interpolation = "random"  # "bilinear", "bicubic", or one of them each time.
    augment.hflip = 0.5  # Probability of a horizontal flip.
    augment.randaugment_ops = 2  # Operations per image; 0 switches RandAugment off.
    augment.randaugment_magnitude = 9.0  # Mean strength, 0 to 10.
    augment.randaugment_std = 0.5  # Standard deviation of the strength.
    augment.color_jitter = 0.4  # Acts only where RandAugment is off.
    augment.erase = 0.25  # Probability that a rectangle is replaced by noise.

    config.mixing = mixing = ml_collections.ConfigDict()
    mixing.mixup = 0.8  # Alpha of the Beta distribution of mixup's weight; 0 turns mixup off.
    mixing.cutmix = 1.0  # The same for cutmix.
    mixing.switch_probability = 0.5  # Of cutmix instead of mixup where both are on.

    config.optim = optim = ml_collections.ConfigDict()
    optim.name = "lamb"  # "adamw" or "lamb".
    optim.lr = 5e-3  # Peak learning rate, absolute (not scaled by the batch).
    optim.warmup_lr = 1e-6  # Learning rate of the first step.
    optim.final_lr = 5e-6  # At the end of the cosine, and during cool-down.
    optim.warmup_epochs = 20.0
    optim.cooldown_epochs = 10.0  # At final_lr, after `epochs`.
    optim.weight_decay = 0.05  # On kernels only: no bias, norm, embedding, class token or LayerScale.
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.eps = 1e-8
    optim.clip_norm = 5.0  # Global norm that gradients are clipped to; 0 turns clipping off.

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = -1  # Devices over which the batch alone is split; -1 takes all that are left.
    mesh.fsdp = 1  # Devices over which batch, parameters and optimiser state are split.
    mesh.tensor = 1  # Devices over which heads and hidden units are split.

    config.log_every = 100  # Steps between two lines of metrics.
    config.eval_every = 0  # Steps between two evaluations; 0: at the end only.
    config.eval_batch_size = 1024  # Examples per evaluation step, over all devices and processes.
    config.max_skipped_steps = 0  # Non-finite steps that the whole run may leave out before it stops.
    config.checkpoint_every = 1000  # Steps between two checkpoints; the last step is always saved.
    config.keep_checkpoints = 2  # Newest ones kept; the best one is kept besides.
    config.lock()
    return config


def parse_arguments(argument: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Parses the text after the colon of `--config=configs/x.py:name=value,...`.

    Args:
      argument: comma-separated `name=value` pairs; None or empty for none.
      **defaults: the names that the recipe knows, with default values that also fix their types.

    Raises:
      ValueError: a pair without `=`, an unknown name (the nearest is named), or a value of another type.
    """
    values = dict(defaults)
    for pair in filter(None, (argument or "").split(",")):
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"config argument {pair!r} is not of the form name=value")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.0)
            hint = f"did you mean {near[0]!r}?" if near else "this config takes none"
            raise ValueError(f"unknown config argument {name!r}; {hint} (known: {sorted(defaults)})")
        values[name] = _parse_value(name, text, defaults[name])
    return ml_collections.ConfigDict(values)


def _parse_value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"config argument {name}={text!r} is no Python value") from error
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"config argument {name}={text!r} should be of type {type(default).__name__}")
    return value


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks what can be checked before anything is built.

    Raises:
      ValueError: naming the field, its value and what it should be.
    """

    def check(ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"config.{field} is {_get(config, field)!r}; expected {expected}")

    for field in ("epochs", "batch_size", "eval_batch_size", "accumulation_steps", "log_every"):
        check(config[field] > 0, field, "a positive number")
    for field in ("checkpoint_every", "keep_checkpoints"):
        check(config[field] >= 1, field, "an integer of at least 1")
    check(config.max_skipped_steps >= 0, "max_skipped_steps", "0 (stop at the first) or a positive integer")
    check(config.eval_every >= 0, "eval_every", "0 (only at the end) or a positive number of steps")
    check(
        config.batch_size % config.accumulation_steps == 0,
        "accumulation_steps",
        f"a divisor of batch_size={config.batch_size}",
    )
    mixes = config.mixing.mixup > 0 or config.mixing.cutmix > 0
    check(
        not (mixes and config.batch_size % 2), "batch_size", "an even number, as mixup and cutmix mix pairs"
    )
    for field in ("mixing.mixup", "mixing.cutmix", "optim.clip_norm", "optim.weight_decay"):
        check(_get(config, field) >= 0, field, "a number of at least 0")
    for field in ("label_smoothing", "ema_decay", "model.drop_path"):
        check(0 <= _get(config, field) < 1, field, "a number in [0, 1)")
    check(0 <= config.mixing.switch_probability <= 1, "mixing.switch_probability", "a probability in [0, 1]")
    check(0 < config.data.crop_fraction <= 1, "data.crop_fraction", "a fraction in (0, 1]")
    check(config.optim.name in ("adamw", "lamb"), "optim.name", "'adamw' or 'lamb'")
    check(config.optim.lr > 0, "optim.lr", "a positive number")
    check(
        0 <= config.optim.warmup_epochs < config.epochs,
        "optim.warmup_epochs",
        f"at least 0 and less than epochs={config.epochs}",
    )
    check(config.optim.cooldown_epochs >= 0, "optim.cooldown_epochs", "a number of at least 0")
    check(
        config.model.implementation in (None, "xla") or config.model.mode in ("auto", "chunkwise"),
        "model.mode",
        f"'auto' or 'chunkwise', which model.implementation={config.model.implementation!r} computes",
    )
    check(config.model.dtype in ("float32", "bfloat16"), "model.dtype", "'float32' or 'bfloat16'")


def _get(config: ml_collections.ConfigDict, field: str) -> Any:
    value: Any = config
    for key in field.split("."):
        value = value[key]
    return value
