"""What weights say of themselves: the model that they are of, its inputs and outputs, what it scored and on what."""

import dataclasses
import functools
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vir_jax
from vir_jax.models import VisionModel
from vir_jax.runs.load import Run
from vir_jax.runs.model import image_size
from vir_jax.weights.errors import WeightsError

KEY = "vir_jax"
"""Of the card in a config.json, which may be another library's besides."""


@dataclasses.dataclass(frozen=True)
class Card:
    """What stands beside the weights; None or empty where it is not known.

    Attributes:
        model: keywords of `create_model` but the number of classes.
        num_classes: width of the head.
        class_names: in the order of the logits.
        mean: of the colours in [0, 1], taken away before the model.
        std: that they are divided by then.
        crop_fraction: of an image's side that the evaluation kept.
        score: metrics of the evaluation.
        scored_on: data set and split that they were computed on.
        trained: the run: step, and which weights of it ("raw", or "ema", their moving average).
        bce_loss: whether it was trained with `config.bce_loss`: the sigmoid gives its probabilities then, not the
            softmax.
        exported_with: version of vir_jax and commit of its source.
    """

    model: dict[str, Any]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_fraction: float | None = None
    score: dict[str, float] = dataclasses.field(default_factory=dict)
    scored_on: dict[str, Any] = dataclasses.field(default_factory=dict)
    trained: dict[str, Any] = dataclasses.field(default_factory=dict)
    bce_loss: bool = False
    exported_with: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise WeightsError(
                f"there are {len(self.class_names)} class names for {self.num_classes} classes; expected one for each"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the card as JSON data."""
        return dataclasses.asdict(dataclasses.replace(self, exported_with=software()))


def card_of_json(data: Mapping[str, Any], *, where: str) -> Card:
    """Return a card from JSON data.

    Raises:
        WeightsError: a field that there is not, or that is missing.
    """
    fields = {field.name for field in dataclasses.fields(Card)}
    if unknown := sorted(data.keys() - fields):
        raise WeightsError(
            f"{where} has {', '.join(unknown)}, which this version does not know; it knows {sorted(fields)}"
        )
    if missing := sorted({"model", "num_classes"} - data.keys()):
        raise WeightsError(f"{where} does not say {', '.join(missing)}")
    lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
    return Card(**{**data, **lists})


def card_of_run(run: Run) -> Card:
    """Return what a run says of itself."""
    data, size = run.config.data, image_size(run.config.model)
    return Card(
        model=model_options(run.model, size),
        num_classes=run.task.num_outputs,
        class_names=run.class_names if len(run.class_names) == run.task.num_outputs else None,
        mean=tuple(data.mean),
        std=tuple(data.std),
        crop_fraction=data.crop_fraction,
        score=dict(run.metrics or {}),
        scored_on={"dataset": data.dataset, "split": data.eval_split} if run.metrics else {},
        trained={"task": run.config.task, "step": run.step, "weights": run.weights},
        bce_loss=run.config.bce_loss,
    )


def model_options(model: VisionModel, size: Sequence[int]) -> dict[str, Any]:
    """Return the keywords of `create_model` that make a model again, for images of (height, width) pixels."""
    height, width = size
    return {
        **model.options,
        "image_size": height if height == width else [height, width],
        # Whether there is one; what it began at does not matter any more.
        "layer_scale": 1e-5 if model.has_layer_scale else None,
    }


@functools.cache
def software() -> dict[str, str | None]:
    """Return the version of vir_jax, and the commit where it runs from a checkout: "+" where files were changed."""
    folder = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # Installed, the package may lie below some other repository.
    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", "__init__.py") else None
    changed = "+" if commit and git("status", "--porcelain", "--untracked-files=no") else ""
    return {"version": vir_jax.__version__, "commit": commit and commit + changed}
