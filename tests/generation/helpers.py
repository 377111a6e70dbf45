"""What the tests of generation share: tiny models of pixels, and all images of a tiny alphabet."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vir_jax.models import create_model


@functools.cache
def model_of(height, width, levels, **options):
    """A model of pixels whose every parameter matters, the head too."""
    given = {
        "name": "vir_pico1",
        "layer_scale": None,
        "image_size": (height, width),
        "levels": levels,
    } | options
    name = given.pop("name")
    made = nnx.eval_shape(lambda: create_model(name, num_classes=1, rngs=nnx.Rngs(0), stem="pixels", **given))
    graph, params = nnx.split(made)
    draw = np.random.default_rng(1).standard_normal

    def drawn(path, leaf):
        """A head of moderate outputs, as a trained one has: rounding is not blown up by narrow distributions."""
        scale = 0.05 if "head" in str(path) else 0.2
        return jnp.asarray(scale * draw(leaf.shape) + ("norm" in str(path)), leaf.dtype)

    params = jax.tree.map_with_path(drawn, params)
    return nnx.merge(graph, params)


def all_images(height, width, levels, channels=1):
    """Every image there is, [levels ** dimensions, height, width, channels]."""
    values = itertools.product(range(levels), repeat=height * width * channels)
    return np.array(list(values), np.int32).reshape(-1, height, width, channels)


def some_images(count, height, width, levels, channels=1, seed=0):
    shape = count, height, width, channels
    return np.random.default_rng(seed).integers(levels, size=shape, dtype=np.int32)
