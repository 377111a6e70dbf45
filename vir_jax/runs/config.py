"""The configuration of a run: every field, its default and its meaning, in one place.

A recipe in `configs/` starts from `default_config()` and sets what differs. The configuration is locked, so a misspelt
field is an error that names the nearest one; `vir_jax.runs.validate` checks all of it before anything is opened or
compiled.
"""

import ast
import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
from ml_collections import config_dict

from vir_jax.imports import load_file
from vir_jax.models import model_options


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
    model.name = (
        "vir_s16"  # {vir|vit|cvir}_{size}{patch}, or a pyramid, vir_h_{size}; vir_jax.models lists them.
    )
    model.image_size = may_be_none(224)  # Pixels, a square's side or (height, width). Never None.
    # Embedding of patches: "linear", "conv" or "conv_vix"; or "pixels", to predict the next. None: the family's.
    model.stem = may_be_none()
    model.mixer = may_be_none()  # Token mixer by name; None: softmax for vit_*, else retention.
    model.mlp_dim = may_be_none()  # Hidden units of the MLP; None: 4 to a channel, 2 for the size vix.
    model.retention = may_be_none()  # "1d" (raster order) or "2d"; None: "1d". ViR only.
    model.chunk_size = may_be_none()  # Tokens per chunk of 1-D retention; None: what was measured to be best.
    model.implementation = may_be_none()  # Of 1-D retention: "xla", or a kernel's name; None: as measured.
    model.levels = may_be_none()  # Of a channel, in models of pixels.
    model.channels = may_be_none()  # 1 (grey: the average of RGB) or 3; None: 3, in models of pixels 1.
    model.mixtures = may_be_none()  # Logistics that a pixel's distribution is mixed of; None: categorical.
    model.local_context = (
        may_be_none()
    )  # In models of pixels, how far a token sees earlier ones; None: the last.
    # What the head reads; None: the class token. To each pixel logits: "dense_patch", "dense_linear", "dense_upernet".
    model.readout = may_be_none()
    model.readout_dim = may_be_none()  # Channels of the head "dense_upernet"; None: 512.
    model.position = "learned"  # "learned", "sincos", "rope", "rope_2d" or "none"; of pyramids "none".
    # The next six are retention's; None is what the family has: in cvir_* a short_conv of 4.
    model.decays = may_be_none()  # "vir", "retnet", "none", "learned" or "token"; None: "vir".
    model.qk_norm = may_be_none()  # Of queries and keys per head: "rms" or "layer"; None: none.
    model.head_norm = may_be_none()  # True: each head's output is divided by its root mean square.
    model.gate = may_be_none()  # True: each head's output is multiplied by swish(gate(x)).
    model.short_conv = may_be_none()  # Width of a causal convolution of tokens before the mixer; None: none.
    model.directions = may_be_none()  # In which heads read: 1, 2 (backwards, too) or, in 2-D, 4; None: 1.
    model.bidirectional = False  # Read the patches forwards, then backwards; 1-D ViR only.
    model.flips = False  # Read the patches backwards in every second block; ViR only.
    # The next two are of pyramids alone.
    model.late_attention = (
        False  # The last half of the blocks of each stage with mixers has softmax attention.
    )
    model.stem_stride = may_be_none()  # Pixels to a token of the first stage: 1, 2 or 4; None: 4.
    model.layer_scale = may_be_none()  # Initial LayerScale, 1e-5 in the ViR recipes; None: no LayerScale.
    model.norm_epsilon = 1e-6  # What layer norms add to the variance; transformers' ViTs have 1e-12.
    model.drop_path_rate = 0.0  # Stochastic depth of the last block; rises linearly over the blocks.
    model.remat = "elementwise"  # What to compute anew in the backward pass: "none", "elementwise" or "full".
    model.dtype = "float32"  # Of the computation, or "bfloat16"; parameters and states are float32 always.
    model.mode = "auto"  # Form of the mixer in training: auto, parallel, recurrent or chunkwise.
    for option in model_options().keys() - model.keys():
        model[option] = may_be_none()  # Of one mixer, which explains it; None: its default.

    config.data = data = Config()
    # A TFDS name, "folder" (one per class; of images and of masks), "table", "hf:user/set", "digits", "digits_scenes".
    data.dataset = "imagenet2012"
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
