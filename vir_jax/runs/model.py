"""A model as pure functions of its parameters, built from a config."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Key

from vir_jax.models import VisionBackbone, create_model, flops
from vir_jax.models.mixers import Retention, Retention2D
from vir_jax.models.pixels import normalize
from vir_jax.runs.state import Params


@dataclasses.dataclass(frozen=True)
class ModelFunctions:
    """Pure functions of a model: `init(key) -> params` and `apply(params, images, key) -> logits`."""

    config: ml_collections.ConfigDict
    num_classes: int
    graph: nnx.GraphDef[Any]

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters, a nested dict of float32 arrays."""
        return nnx.to_pure_dict(nnx.state(_create(self.config, self.num_classes, key), nnx.Param))

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
          mode: form of retention; None takes the config's.
        """
        model = nnx.merge(self.graph, params)
        return model(images, mode=mode or self.config.mode, key=key)

    def flops(self, size: tuple[int, int]) -> int | None:
        """Floating-point operations of a forward pass on one image of (height, width) pixels.

        1-D retention in mode "auto" is counted as chunkwise, the cheaper of the forms it chooses from. The
        forms of 2-D retention other than the parallel one are not counted: None.
        """
        model = nnx.eval_shape(lambda: _create(self.config, self.num_classes, jax.random.key(0)))
        mixer, mode = model.blocks.mixer, self.config.mode
        if isinstance(mixer, Retention2D) and mode != "parallel":
            return None
        if mode == "auto":
            mode = "chunkwise" if isinstance(mixer, Retention) else "parallel"
        return 2 * flops(model, size, mode=mode)  # A multiply-add is two operations.


def model_functions(config: ml_collections.ConfigDict, num_classes: int) -> ModelFunctions:
    """The model of `config.model` as pure functions; nothing is allocated."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: _create(config, num_classes, jax.random.key(0))))
    return ModelFunctions(config, num_classes, graph)


def _create(config: ml_collections.ConfigDict, num_classes: int, key: Key[Array, ""]) -> VisionBackbone:
    optional = {name: config[name] for name in ("retention", "readout", "implementation")}
    return create_model(
        config.name,
        num_classes=num_classes,
        rngs=nnx.Rngs(key),
        image_size=image_size(config),
        position=config.position,
        bidirectional=config.bidirectional,
        drop_path_rate=config.drop_path,
        remat=config.remat,
        dtype=jnp.dtype(config.dtype),
        **{name: value for name, value in optional.items() if value is not None},
    )


def make_predict(
    model: ModelFunctions, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[..., Float[Array, "b classes"]]:
    """(params, uint8 images [b y x 3], mode=...) -> float32 logits, jitted."""

    @functools.partial(jax.jit, static_argnames="mode")
    def predict(params: Params, images: Array, *, mode: str) -> Array:
        return model.apply(params, normalize(images, mean, std), mode=mode).astype(jnp.float32)

    return predict


def image_size(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """(height, width) in pixels of `config.model.image_size`, which may be (side,) for a square.

    Raises:
      ValueError: any other number of numbers.
    """
    sides = tuple(config.image_size)
    if len(sides) not in (1, 2):
        raise ValueError(
            f"config.model.image_size is {sides}; expected (height, width), or one number for a square"
        )
    return sides[0], sides[-1]
