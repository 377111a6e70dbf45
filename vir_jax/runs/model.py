"""A model as pure functions of its parameters, built from a config."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Key

from vir_jax.models import VisionBackbone, create_model, flops
from vir_jax.models.mixers import Retention, Retention2D
from vir_jax.models.pixels import normalize
from vir_jax.runs.state import Params

# Of `create_model`: a config's `model` section, or any mapping. (A ConfigDict is no Mapping.)
Options: TypeAlias = Mapping[str, Any] | ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class ModelFunctions:
    """Pure functions of a model: `init(key) -> params` and `apply(params, images, key) -> logits`."""

    options: Options
    num_classes: int
    graph: nnx.GraphDef[Any]

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters, a nested dict of float32 arrays."""
        return nnx.to_pure_dict(nnx.state(_create(self.options, self.num_classes, key), nnx.Param))

    def apply(
        self,
        params: Params,
        images: Float[Array, "b y x 3"],
        key: Key[Array, ""] | None = None,
        *,
        mode: str | None = None,
    ) -> Float[Array, "b classes"]:
        """Logits of normalised images.

        Args:
          params: of `init`.
          images: of any size that the patch divides.
          key: turns drop path on; None computes deterministically.
          mode: form of retention; None takes the model's own.
        """
        model = nnx.merge(self.graph, params)
        return model(images, mode=mode, key=key)

    def flops(self, size: tuple[int, int]) -> int | None:
        """Floating-point operations of a forward pass on one image of (height, width) pixels.

        1-D retention in mode "auto" is counted as chunkwise, the cheaper of the forms it chooses from. The
        forms of 2-D retention other than the parallel one are not counted: None.
        """
        model = nnx.eval_shape(lambda: _create(self.options, self.num_classes, jax.random.key(0)))
        mixer, mode = model.blocks.mixer, model.mode
        if isinstance(mixer, Retention2D) and mode != "parallel":
            return None
        if mode == "auto":
            mode = "chunkwise" if isinstance(mixer, Retention) else "parallel"
        return 2 * flops(model, size, mode=mode)  # A multiply-add is two operations.


def model_functions(options: Options, num_classes: int) -> ModelFunctions:
    """The model of a config's `model` section as pure functions; nothing is allocated.

    Raises:
      ValueError: options that `create_model` refuses.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: _create(options, num_classes, jax.random.key(0))))
    return ModelFunctions(options, num_classes, graph)


def _create(options: Options, num_classes: int, key: Key[Array, ""]) -> VisionBackbone:
    return create_model(**options, num_classes=num_classes, rngs=nnx.Rngs(key))


def make_predict(
    model: ModelFunctions, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[..., Float[Array, "b classes"]]:
    """(params, uint8 images [b y x 3], mode=...) -> float32 logits, jitted."""

    @functools.partial(jax.jit, static_argnames="mode")
    def predict(params: Params, images: Array, *, mode: str) -> Array:
        return model.apply(params, normalize(images, mean, std), mode=mode).astype(jnp.float32)

    return predict


def image_size(options: Options) -> tuple[int, int]:
    """(height, width) in pixels of a model's option `image_size`, a square's side or a pair."""
    size = options["image_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])
