"""Weights in and out: a folder of tensors and JSON, a ready model, a run."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Float, UInt8

from vir_jax.inference.predict import Classifier
from vir_jax.models import VisionModel
from vir_jax.models.grids import fit_grid
from vir_jax.models.options import CHANNELS
from vir_jax.models.pixels import normalize
from vir_jax.models.variants import parse_name
from vir_jax.parallel.sharding import dotted
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.checkpoint_reader import NotEvaluatedError, has_checkpoints
from vir_jax.runs.config import default_config
from vir_jax.runs.load import Run, load_run
from vir_jax.runs.model import ModelFunctions, model_functions
from vir_jax.runs.model import image_size as model_image_size
from vir_jax.runs.state import Params, TrainState
from vir_jax.runs.storage import open_workdir
from vir_jax.runs.validate import validate
from vir_jax.tasks import make_task
from vir_jax.tasks.classification import Classification
from vir_jax.weights.card import KEY, Card, card_of_json, card_of_run
from vir_jax.weights.errors import WeightsError
from vir_jax.weights.files import CONFIG, Json, read_weights, write_weights
from vir_jax.weights.fitting import fit_colours, fit_patch, fit_positions, fit_statistics, matching_classes
from vir_jax.weights.layouts import WeightLayout, find_layout
from vir_jax.weights.zoo import find_weights, zoo_names

Flat = dict[str, np.ndarray]
"""Parameters by dotted name."""


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A model from a folder of weights.

    Attributes:
        card: what is known of it.
        functions: the model as pure functions of `params`.
        params: the weights.
    """

    card: Card
    functions: ModelFunctions
    params: Params

    def classifier(self) -> Classifier:
        """Return what classifies image files with this model (`vir_jax.inference.predict`).

        Raises:
            WeightsError: normalisation or class names are not known, or the model has a class for each pixel.
        """
        if self.model.dense:
            raise WeightsError(
                f"the model has readout={self.model.readout.reads!r}, a class for each pixel and none for an image;"
                " masks are written from a run: predict.py --workdir=... --segment=FOLDER"
            )
        mean, std = normalisation(self.card)
        names = class_names(self.card)
        config = default_config()
        config.bce_loss = self.card.bce_loss
        return Classifier(
            functions=self.functions,
            params=self.params,
            class_names=names,
            image_size=model_image_size(self.card.model),
            mean=mean,
            std=std,
            crop_fraction=self.card.crop_fraction or config.data.crop_fraction,
            background=tuple(config.data.background),
            probabilities=Classification(config, names).probabilities,
        )

    @functools.cached_property
    def model(self) -> VisionModel:
        """The model with these weights, as a module; it takes normalised images."""
        return self.functions.model(self.params)

    def __call__(self, images: UInt8[Array | np.ndarray, "b y x colours"]) -> Float[Array, "b classes"]:
        """Return the logits of images in colours of 0 to 255.

        Raises:
            WeightsError: the normalisation is not known.
        """
        mean, std = normalisation(self.card)
        return self.model(normalize(jnp.asarray(images), mean, std))


def load(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    image_size: int | Sequence[int] | None = None,
    patch: int | None = None,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> PretrainedModel:
    """Read a model from a folder of weights, and fit it to other images and classes where these are named.

    The position embedding is resampled as the layout's own code does, Linformer's matrix as the model does; the patch
    embedding by the pseudo-inverse of resizing, its kernel's channels as `fit_colours` says. Classes that are known by
    name keep their part of the head, the others start afresh.

    Args:
        path: folder with model.safetensors and config.json, or a safetensors file; or a name of the zoo
            (`vir_jax.weights.zoo`).
        layout: name of `LAYOUTS`; None: seen from the tensors' names.
        image_size: pixels, a square's side or (height, width); None: as stored.
        patch: pixels; None: as stored.
        channels: 1 (grey), 3 or 4; None: as stored in our own files, 3 of other libraries'.
        class_names: wanted, in the order of the logits; None: as stored.
        num_classes: wanted where their names are not known; another number than stored makes a fresh head.
        mean: of the colours in [0, 1]; None: as stored.
        std: that they are divided by; None: as stored.
        seed: of what starts afresh.

    Raises:
        FileNotFoundError: there is nothing.
        WeightsError: files that are damaged, tensors that do not fit, or no classes.
    """
    path = find_weights(path)
    tensors, beside = read_weights(path)
    found = find_layout(layout, tensors)
    where = os.fspath(path)
    stored = _card(found, tensors, beside, where)
    if KEY not in beside.get(CONFIG, {}):
        channels = channels or 3  # Other libraries' models become ours, which read files as RGB.
    own = model_functions(stored.model, max(stored.num_classes, 1))
    params = found.take(tensors, stored, shapes=_shapes(own, head=stored.num_classes > 0), where=where)
    wanted = _wanted(stored, image_size, patch, channels, class_names, num_classes, mean, std, where)
    functions = model_functions(wanted.model, wanted.num_classes)
    fresh = jax.jit(functions.init)(jax.random.key(seed))
    fitted = _fit(params, _on_host(fresh), stored, wanted, found)
    logging.info("read %s from %s in the layout %r", wanted.model["name"], where, found.name)
    return PretrainedModel(wanted, functions, _nested(fitted, fresh))


def open_model(
    source: str | os.PathLike[str], *, checkpoint: str = "best", weights: str | None = None
) -> PretrainedModel:
    """Return the model of a run, of a folder of weights, or of the zoo.

    Args:
        source: a workdir, a folder or file that `load` reads, or a name of the zoo.
        checkpoint: of a run, see `load_run`; its last one where none was evaluated.
        weights: of a run.
    """
    # Names of the zoo are no paths, and a bucket holds runs alone.
    if not os.path.exists(source) and os.fspath(source) in zoo_names():
        return load(source)
    if not has_checkpoints(open_workdir(source)):
        return load(source)
    try:
        return of_run(load_run(source, checkpoint, weights=weights))
    except NotEvaluatedError:
        return of_run(load_run(source, "last", weights=weights))


def of_run(run: Run) -> PretrainedModel:
    """Return the model of a run."""
    return PretrainedModel(card_of_run(run), run.functions, run.params)


def save(folder: str | os.PathLike[str], source: Run | PretrainedModel, *, layout: str = "vir") -> None:
    """Write a model as a folder of weights: model.safetensors, config.json, and what else its readers want.

    Args:
        folder: made where it is absent.
        source: a run (`load_run`) or what `load` gave.
        layout: name of `LAYOUTS`.

    Raises:
        FileExistsError: the folder holds weights.
        WeightsError: the layout has no such model.
    """
    source = of_run(source) if isinstance(source, Run) else source
    card = source.card
    written = find_layout(layout)
    beside = written.config(card)
    beside[CONFIG] = {**beside[CONFIG], KEY: card.to_json()}
    write_weights(folder, written.export(_on_host(source.params), card), beside)


def save_run(workdir: str | os.PathLike[str], source: PretrainedModel) -> None:
    """Write a model as a run of one checkpoint: evaluation, prediction, inspection and `init_from` start from it.

    Args:
        workdir: a new one.
        source: what `load` gave.

    Raises:
        FileExistsError: there is a run.
        WeightsError: normalisation or class names are not known.
    """
    card = source.card
    mean, std = normalisation(card)
    names = class_names(card)
    if has_checkpoints(open_workdir(workdir)):
        raise FileExistsError(f"{workdir} holds a run; name another folder")
    config = default_config()
    config.model.layer_scale = None
    for option, value in card.model.items():
        config.model[option] = tuple(value) if isinstance(value, list) else value
    config.data.mean, config.data.std = mean, std
    config.data.crop_fraction = card.crop_fraction or config.data.crop_fraction
    config.bce_loss = card.bce_loss
    config.data.dataset = card.scored_on.get("dataset", config.data.dataset)
    config.data.eval_split = card.scored_on.get("split", config.data.eval_split)
    validate(config)
    task = make_task(config, names)
    step = int(card.trained.get("step", 0))
    state = TrainState(jnp.int32(step), source.params, optax.identity().init(source.params), None)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(
            state,
            progress={},
            config=config,
            metadata={"class_names": list(names), "imported": card.to_json()},
        )
        if task.best in card.score:
            checkpoints.record_evaluation(
                step, card.score, score=task.score(card.score), on=dict(card.scored_on)
            )


def normalisation(card: Card) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of the colours.

    Raises:
        WeightsError: they are not known.
    """
    if card.mean is None or card.std is None:
        raise WeightsError(
            "no file says how the model's images were normalised: give mean and std of the colours in [0, 1]. ViTs"
            " of AugReg have 0.5 0.5 0.5 for both, DeiT and DINO those of ImageNet, 0.485 0.456 0.406 and 0.229 0.224"
            " 0.225"
        )
    return card.mean, card.std


def class_names(card: Card) -> tuple[str, ...]:
    """Return the names of the classes.

    Raises:
        WeightsError: they are not known.
    """
    if card.class_names is None:
        raise WeightsError(
            f"the names of the {card.num_classes} classes are not known: give them, as data of the model name them"
        )
    return card.class_names


def _card(layout: WeightLayout, tensors: Flat, beside: Mapping[str, Json], where: str) -> Card:
    """Return the card of tensors: ours, where there is one, else what shapes and JSON of others say."""
    if KEY in beside.get(CONFIG, {}):
        return card_of_json(beside[CONFIG][KEY], where=f"{where}: {CONFIG}")
    card = layout.card({name: tensor.shape for name, tensor in tensors.items()}, beside, where=where)
    kernel = tensors.get(layout.kernel(tensors) or "")
    channels = 3 if kernel is None else kernel.shape[1]
    if channels not in CHANNELS:
        raise WeightsError(f"{where}: the patch embedding reads {channels} channels; expected 1, 3 or 4")
    return card if channels == 3 else dataclasses.replace(card, model={**card.model, "channels": channels})


def _wanted(
    stored: Card,
    size: int | Sequence[int] | None,
    patch: int | None,
    channels: int | None,
    class_names: Sequence[str] | None,
    num_classes: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    where: str,
) -> Card:
    """Return the card of the model that is asked for."""
    model = dict(stored.model)
    if size is not None:
        model["image_size"] = size if isinstance(size, int) else list(size)
    if patch is not None:
        _, _, old = parse_name(model["name"])
        model["name"] = model["name"].removesuffix(str(old)) + str(patch)
    if channels is not None:
        model["channels"] = None if channels == 3 else channels
    colours = model.get("channels") or 3
    if colours not in CHANNELS:
        raise WeightsError(f"{colours} channels are asked for; expected 1, 3 or 4")
    names = stored.class_names if class_names is None else tuple(class_names)
    if num_classes is not None and class_names is None and num_classes != stored.num_classes:
        names = None
    classes = num_classes or (len(names) if names is not None else stored.num_classes)
    if not classes:
        raise WeightsError(f"{where} has no head; say which classes, or how many, it should get")
    same = (
        _given(model) == _given(stored.model)
        and names == stored.class_names
        and classes == stored.num_classes
    )
    return dataclasses.replace(
        stored,
        model=model,
        num_classes=classes,
        class_names=names,
        mean=_of_colours(stored.mean if mean is None else mean, colours),
        std=_of_colours(stored.std if std is None else std, colours),
        score=stored.score if same else {},
        scored_on=stored.scored_on if same else {},
    )


def _given(model: Mapping[str, Any]) -> dict[str, Any]:
    return {option: value for option, value in model.items() if value is not None}


def _of_colours(values: Sequence[float] | None, colours: int) -> tuple[float, ...] | None:
    return None if values is None else fit_statistics(values, colours)


def _fit(params: Flat, fresh: Flat, stored: Card, wanted: Card, layout: WeightLayout) -> Flat:
    """Return the parameters of the model that is wanted."""
    position = "stem.position.embedding"  # Resampled as its library does, all else as our models do.
    fitted = {
        name: fit_grid(name, params[name], array.shape) if name in params.keys() - {position} else array
        for name, array in fresh.items()
    }
    if position in params:
        rows, cols = fresh[position].shape[1:3]
        fitted[position] = fit_positions(params[position], (rows, cols), layout.resampling)
    for kernel in {
        "stem.embedding.conv.kernel",
        "stem.embedding.convs.0.kernel",
        "stem.conv1.conv.kernel",
    } & params.keys():
        fitted[kernel] = fit_colours(params[kernel], fresh[kernel].shape[2])
    if (kernel := "stem.embedding.conv.kernel") in params:
        fitted[kernel] = fit_patch(fitted[kernel], fresh[kernel].shape[0])
    if stored.class_names == wanted.class_names and stored.num_classes == wanted.num_classes:
        return fitted
    matches = matching_classes(stored.class_names, wanted.class_names) if stored.num_classes else {}
    logging.info(
        "%d of %d classes are known by name, the others start afresh", len(matches), wanted.num_classes
    )
    for name in (name for name in fresh if name.startswith("readout.head.")):
        fitted[name] = np.array(fresh[name])
        fitted[name][..., list(matches)] = params[name][..., list(matches.values())] if matches else 0
    return fitted


def _shapes(functions: ModelFunctions, *, head: bool) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(functions.init, jax.random.key(0))
    return {
        name: leaf.shape
        for name, leaf in _flat(shapes).items()
        if head or not name.startswith("readout.head.")
    }


def _flat(params: Params) -> dict[str, Any]:
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def _on_host(params: Params) -> Flat:
    return {name: np.asarray(array) for name, array in _flat(params).items()}


def _nested(flat: Flat, like: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(flat[dotted(path)]), like)
