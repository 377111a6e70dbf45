"""What the tests of models share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vir_jax.models import VisionModel, create_model

GRID = (3, 4)
IMAGE = (2, *GRID, 3)  # With patches of one pixel.


def images(shape: tuple[int, ...] = IMAGE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def create(name: str = "vir_pico1", **options: Any) -> VisionModel:
    """A tiny model for tiny images."""
    return create_model(name, **{"num_classes": 5, "rngs": nnx.Rngs(0), "image_size": GRID} | options)


@functools.cache
def abstract(name: str = "vir_pico1", **options: Any) -> VisionModel:
    """The same in shapes alone: nothing is compiled or allocated."""
    return nnx.eval_shape(lambda: create(name, **options))


@functools.cache
def published(name: str) -> VisionModel:
    """A named model with 1000 classes for 224 x 224 pixels, in shapes alone."""
    return nnx.eval_shape(lambda: create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))


@functools.cache
def initial_parameters(name: str, seed: int = 0) -> nnx.State:
    """What `create` initialises, but under jit, which compiles the initialisers all at once."""
    return initialise(name, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def initialise(name: str, key: jax.Array) -> nnx.State:
    return nnx.state(create(name, rngs=nnx.Rngs(key)))


def fresh(name: str = "vir_pico1", **options: Any) -> VisionModel:
    """A tiny model as initialised; the options must be such as leave the parameters alone."""
    return nnx.merge(nnx.graphdef(abstract(name, **options)), initial_parameters(name))


def lively(name: str = "vir_pico1", **options: Any) -> VisionModel:
    """A tiny model whose every parameter matters: at initialisation LayerScale silences the blocks."""
    graph, params = nnx.split(abstract(name, **options))
    draw = np.random.default_rng(1).standard_normal
    params = jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(0.2 * draw(leaf.shape) + ("norm" in str(path)), leaf.dtype), params
    )
    return nnx.merge(graph, params)


def lively_with_statistics(state: nnx.State) -> nnx.State:
    """Values of abstract variables, of which all matter: norms near one, and the variances of batches positive."""
    draw = np.random.default_rng(1).standard_normal

    def value(path: Any, leaf: Any) -> jax.Array:
        drawn, name = 0.2 * draw(leaf.shape), str(path)
        drawn = 1.5 + drawn if "var" in name else drawn + ("norm" in name and "scale" in name)
        return jnp.asarray(drawn, leaf.dtype)

    return jax.tree.map_with_path(value, state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(graph, method, options, params, x, key):
    options = dict(options) if key is None else dict(options, key=key)
    return getattr(nnx.merge(graph, params), method)(x, **options)


def run(
    model: VisionModel, x: jax.Array, method: str = "__call__", *, key: Any = None, **options: Any
) -> Any:
    """A method of the model, jitted as training does: a pure function of parameters, images and key."""
    graph, params = nnx.split(model)
    return _run(graph, method, tuple(options.items()), params, x, key)


def relative_error(x: Any, reference: Any) -> float:
    """Root mean square of the difference, relative to the reference's."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def parameters(model: VisionModel) -> dict[str, Any]:
    """Parameters (or their shapes, of an abstract model) by dotted path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    }
