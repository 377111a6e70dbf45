"""ViTDet's pyramid: shapes and strides from any patch, and its maps by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import published
from vir_jax.models.simple_pyramid import SimplePyramid


def shapes(pyramid, grid):
    graph, state = nnx.split(pyramid)
    x = jax.ShapeDtypeStruct((2, *grid, 8), "float32")
    found = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, x)
    return [x.shape for x in found]


@pytest.mark.parametrize(("stride", "finest"), [(16, 4), (14, 3.5), (2, 0.5)])
def test_shapes_and_strides(stride, finest):
    pyramid = nnx.eval_shape(lambda: SimplePyramid(8, stride=stride, out_dim=12, rngs=nnx.Rngs(0)))
    assert pyramid.strides == tuple(finest * 2**level for level in range(5))
    assert pyramid.dims == (12,) * 5
    sides = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert shapes(pyramid, (4, 6)) == [(2, *side, 12) for side in sides]
    assert shapes(pyramid, (3, 5)) == [(2, *s, 12) for s in [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]]
    four = nnx.eval_shape(
        lambda: SimplePyramid(8, stride=stride, out_dim=12, coarsest=False, rngs=nnx.Rngs(0))
    )
    assert four.strides == pyramid.strides[:4]
    assert len(shapes(four, (4, 6))) == 4


def test_parameters_are_those_of_vitdet():
    """Of ViT-B: by hand from the layers, deconvolutions with bias, convolutions without."""
    pyramid = nnx.eval_shape(lambda: SimplePyramid(768, rngs=nnx.Rngs(0)))
    c, d = 768, 256
    deconvolutions = (c * c // 2 * 4 + c // 2) + (c // 2 * c // 4 * 4 + c // 4) + (c * c // 2 * 4 + c // 2)
    projections = d * (c // 4 + c // 2 + c + c)
    expected = deconvolutions + 2 * (c // 2) + projections + 4 * 9 * d * d + 8 * 2 * d
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(pyramid, nnx.Param)))
    assert count == expected


def test_maps_by_hand():
    """The map that is enlarged and shrunk by nothing, from NumPy; and which places a place of the others reads."""
    make = functools.partial(SimplePyramid, 8, stride=2, out_dim=4)
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    state = jax.jit(lambda: nnx.state(make(rngs=nnx.Rngs(0))))()
    pyramid = nnx.merge(graph, state)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 6, 8)), jnp.float32)
    apply = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    maps = apply(state, x)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    projected = norm(np.asarray(x, np.float64) @ np.asarray(pyramid.project[2].kernel[...])[0, 0])
    padded, kernel = (
        np.pad(projected, ((0, 0), (1, 1), (1, 1), (0, 0))),
        np.asarray(pyramid.smooth[2].kernel[...]),
    )
    smoothed = sum(padded[:, i : i + 4, j : j + 6] @ kernel[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(maps[2], norm(smoothed), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(maps[4], maps[3][:, ::2, ::2])
    changed = apply(state, x.at[0, 2, 3].add(1.0))
    for level, (top, bottom, left, right) in enumerate(
        [(7, 13, 11, 17), (3, 7, 5, 9), (1, 4, 2, 5), (0, 2, 0, 3)]
    ):
        rows, cols = np.nonzero(np.any(np.asarray(changed[level] != maps[level])[0], axis=-1))
        assert top <= rows.min() <= rows.max() < bottom, level
        assert left <= cols.min() <= cols.max() < right, level


def test_it_takes_a_model_s_map():
    model = published("vir_s16")
    (stride,), (dim,) = model.feature_strides, model.feature_dims
    pyramid = nnx.eval_shape(lambda: SimplePyramid(dim, stride=stride, rngs=nnx.Rngs(0)))
    assert pyramid.strides == (4, 8, 16, 32, 64)
    with pytest.raises(ValueError, match="dim=6; expected a multiple of 4"):
        SimplePyramid(6, rngs=nnx.Rngs(0))
