"""A model as pure functions of its variables."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Key

from vir_jax.models import VisionModel, create_model, flops
from vir_jax.models.pixels import normalize
from vir_jax.models.variables import split_variables
from vir_jax.parallel.sharding import parameter_axes

Options: TypeAlias = "Mapping[str, Any] | ml_collections.ConfigDict"
"""Keywords of `create_model`: a config's `model` section, or any mapping. (A ConfigDict is no Mapping.)"""

Variables = dict[str, Any]
"""A nested dict of arrays: parameters, and statistics where the model has them."""


@dataclasses.dataclass(frozen=True)
class ModelFunctions:
    """Pure functions of a model: `init(key) -> variables` and `apply(variables, images, key) -> outputs`.

    Attributes:
        make: of random keys, the model.
        abstract: the model in shapes alone.
    """

    make: Callable[[nnx.Rngs], VisionModel]
    abstract: VisionModel

    @functools.cached_property
    def graph(self) -> nnx.GraphDef[VisionModel]:
        """What of the model is no array."""
        return nnx.graphdef(self.abstract)

    @functools.cached_property
    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """How the variables name their dimensions; see `parameter_axes`."""
        return parameter_axes(nnx.state(self.abstract))

    def init(self, key: Key[Array, ""]) -> tuple[Variables, Variables]:
        """Return fresh parameters, float32, and statistics, an empty dict where the model has none."""
        _, params, statistics = split_variables(self.make(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)

    def apply(
        self, variables: Variables, images: Float[Array, "b y x 3"], *, mode: str | None = None
    ) -> Float[Array, "b classes"]:
        """Return the logits of normalised images, deterministically.

        Args:
            variables: parameters and statistics, of `merge`.
            images: of any size that the patch divides.
            mode: form of the mixer; None takes the model's own.
        """
        return self.model(variables)(images, mode=mode)

    def train(
        self, variables: Variables, images: Float[Array, "b y x 3"], key: Key[Array, ""]
    ) -> tuple[Float[Array, "b classes"], Variables]:
        """Return logits with drop path and batch statistics, and the statistics after this batch."""
        model = self.model(variables)
        model.train()
        logits = model(images, key=key)
        _, _, statistics = split_variables(model)
        return logits, nnx.to_pure_dict(statistics)

    def model(self, variables: Variables) -> VisionModel:
        """Return the model with these variables."""
        return nnx.merge(self.graph, variables)

    def flops(self, size: tuple[int, int]) -> int | None:
        """Count the floating-point operations of a forward pass on one image of (height, width) pixels.

        None where the mixer is not counted in the model's mode.
        """
        try:
            return 2 * flops(
                self.abstract, size, mode=self.abstract.mode
            )  # A multiply-add is two operations.
        except ValueError:
            return None


def model_functions(options: Options, num_classes: int) -> ModelFunctions:
    """Return the model of a config's `model` section as pure functions; nothing is allocated.

    Raises:
        ValueError: options that `create_model` refuses.
    """

    def make(rngs: nnx.Rngs) -> VisionModel:
        return create_model(**options, num_classes=num_classes, rngs=rngs)

    return ModelFunctions(make, nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def image_size(options: Options) -> tuple[int, int]:
    """Return (height, width) in pixels of a model's option `image_size`, a square's side or a pair."""
    size = options["image_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def merge(params: Variables, statistics: Variables) -> Variables:
    """Return one nested dict of two that have no leaf in common."""
    merged = dict(params)
    for name, value in statistics.items():
        merged[name] = merge(params[name], value) if name in params else value
    return merged


def make_predict(
    model: ModelFunctions, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[..., Float[Array, "b classes"]]:
    """Return (variables, uint8 images [b y x 3], mode=...) -> float32 logits, jitted."""

    @functools.partial(jax.jit, static_argnames="mode")
    def predict(variables: Variables, images: Array, *, mode: str) -> Array:
        return model.apply(variables, normalize(images, mean, std), mode=mode).astype(jnp.float32)

    return predict
