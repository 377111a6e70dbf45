"""A model as pure functions of its parameters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Key, Num

from vir_jax.models import VisionModel, create_model, flops
from vir_jax.models.pixels import normalize
from vir_jax.models.variables import batch_statistics, split_variables
from vir_jax.parallel.sharding import parameter_axes
from vir_jax.runs.state import Params

Options: TypeAlias = "Mapping[str, Any] | ml_collections.ConfigDict"
"""Keywords of `create_model`: a config's `model` section, or any mapping. (A ConfigDict is no Mapping.)"""


@dataclasses.dataclass(frozen=True)
class ModelFunctions:
    """A model as pure functions of its variables, a nested dict of float32 arrays, here called `params`.

    They are its parameters and, where it has some, what no gradient changes: statistics such as the running mean of
    batch normalisation, and constants drawn at random. These lie at their places among the parameters, so that whatever
    is done to a run's parameters (average, checkpoint, sharding) is done to them.

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
        """How the parameters name their dimensions; see `parameter_axes`."""
        return parameter_axes(nnx.state(self.abstract))

    def init(self, key: Key[Array, ""]) -> Params:
        """Return fresh variables."""
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(key))))

    def apply(
        self,
        params: Params,
        images: Num[Array, "b y x colours"],
        key: Key[Array, ""] | None = None,
        *,
        mode: str | None = None,
    ) -> Float[Array, "b *n classes"]:
        """Return the logits of images.

        Args:
            params: of `init`.
            images: as the model takes them, of any size that the patch divides.
            key: turns drop path on; None computes deterministically.
            mode: form of the mixer; None takes the model's own.
        """
        return self.model(params)(images, mode=mode, key=key)

    def train(
        self, params: Params, images: Num[Array, "b y x colours"], key: Key[Array, ""]
    ) -> tuple[Float[Array, "b *n classes"], Params]:
        """Return what `apply` does in training, and the statistics after it, at their places among the parameters."""
        _, trained, others = split_variables(self.model(params))
        model = nnx.merge(self.graph, trained, jax.lax.stop_gradient(others))
        model.train()
        outputs = model(images, key=key)
        return outputs, nnx.to_pure_dict(batch_statistics(model))

    @functools.cached_property
    def has_statistics(self) -> bool:
        """Whether there are statistics of batches: the examples of a batch meet in them."""
        return bool(batch_statistics(self.abstract))

    @property
    def parameters(self) -> Params:
        """Shapes of the parameters, statistics left out."""
        _, trained, _ = split_variables(self.abstract)
        return nnx.to_pure_dict(trained)

    def model(self, params: Params) -> VisionModel:
        """Return the model with these parameters."""
        return nnx.merge(self.graph, params)

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


def make_predict(
    model: ModelFunctions, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[..., Float[Array, "b classes"]]:
    """Return (params, uint8 images [b y x 3], mode=...) -> float32 logits, jitted."""

    @functools.partial(jax.jit, static_argnames="mode")
    def predict(params: Params, images: Array, *, mode: str) -> Array:
        return model.apply(params, normalize(images, mean, std), mode=mode).astype(jnp.float32)

    return predict
