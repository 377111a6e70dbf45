"""Pyramids: exact sizes, padding by hand, one function in all modes, and what they refuse."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import images, parameters, relative_error, run
from vir_jax.models import create_model, flops
from vir_jax.models.batch_norm import MOMENTUM, BatchNorm
from vir_jax.models.conv_stage import Conv3x3
from vir_jax.models.pyramid import fold_batch_norm
from vir_jax.models.pyramid_variants import PYRAMID_SIZES
from vir_jax.models.variables import batch_statistics

SIDES = (21, 34)  # Neither is a multiple of the stride, 8.
IMAGE = (2, *SIDES, 3)
TINY = {"stem_stride": 1, "num_classes": 5, "image_size": SIDES}
# At 1000 classes: docs/pyramids.md. Multiply-adds at 224 pixels, mixing included.
PARAMETERS = {
    "vir_h_nano": (276_244, 61_484_448),
    "vir_h_pico": (2_132_104, 383_826_432),
    "vir_h_ti": (34_144_328, 4_898_871_296),
    "vir_h_s": (54_665_640, 8_094_131_712),
    "vir_h_b": (106_252_072, 16_163_014_656),
}


def create(name="vir_h_nano", **options):
    return create_model(name, **{"rngs": nnx.Rngs(0)} | TINY | options)


@functools.cache
def abstract(name="vir_h_nano", **options):
    return nnx.eval_shape(lambda: create(name, **options))


@functools.cache
def lively(name="vir_h_nano", **options):
    """A tiny pyramid whose every parameter and statistic matters."""
    graph, state = nnx.split(abstract(name, **options))
    draw = np.random.default_rng(1).standard_normal

    def value(path, leaf):
        drawn, name = 0.2 * draw(leaf.shape), str(path)
        drawn = 1.5 + drawn if "var" in name else drawn + ("norm" in name and "scale" in name)
        return jnp.asarray(drawn, leaf.dtype)

    return nnx.merge(graph, jax.tree.map_with_path(value, state))


# ---------------------------------------------------------------------------- sizes


def formula(size, classes):
    """Parameters by docs/pyramids.md."""
    c, s = size.dim, size.stem_dim
    total = 27 * s + 2 * s + 9 * s * c + 2 * c
    for i, depth in enumerate(size.depths):
        w = c << i
        scales = 0 if size.layer_scale is None else 2 * w
        total += depth * (18 * w**2 + 6 * w if i < 2 else 12 * w**2 + 13 * w + scales)
        total += 18 * w**2 if i < 3 else 0
    return total + 16 * c + (8 * c + 1) * classes


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameters_and_multiply_adds(name, expected):
    model = abstract(name, num_classes=1000, image_size=224, stem_stride=None)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert (count, flops(model)) == expected
    assert count == formula(PYRAMID_SIZES[name], 1000)
    assert flops(name) == flops(model)


def test_every_size_is_counted():
    assert set(PARAMETERS) == set(PYRAMID_SIZES)


def test_multiply_adds_by_hand():
    """Of vir_h_ti without the mixing, 4.69 G; and the mixing in the form that is asked for."""
    model = abstract("vir_h_ti", num_classes=1000, image_size=224, stem_stride=None)
    c, s = 80, 32
    stem = 27 * s * 112**2 + 9 * s * c * 56**2
    stages = 1 * 18 * c**2 * 56**2 + 3 * 18 * (2 * c) ** 2 * 28**2
    stages += 8 * 12 * (4 * c) ** 2 * 14**2 + 4 * 12 * (8 * c) ** 2 * 7**2
    downsample = sum(18 * (c << i) ** 2 * (28 >> i) ** 2 for i in range(3))
    rest = stem + stages + downsample + 8 * c * 1000
    assert round(rest / 1e9, 2) == 4.69
    assert flops(model) == rest + 8 * 2 * 196**2 * 4 * c + 4 * 2 * 49**2 * 8 * c
    # Five operations of d x d to two multiply-adds, heads of 40.
    assert flops(model, mode="recurrent") == rest + (8 * 196 * 4 * c + 4 * 49 * 8 * c) * 5 * 40 // 2
    assert flops(abstract("vir_h_ti", num_classes=1000, image_size=224, stem_stride=2), 112) == pytest.approx(
        rest + 8 * 2 * 196**2 * 4 * c + 4 * 2 * 49**2 * 8 * c - 27 * s * 56**2 * 3, rel=1e-12
    )


def test_shapes_and_names():
    model = abstract(image_size=32, stem_stride=None)
    assert (model.patch, model.dim, model.depth, model.channels) == (32, 80, 8, 3)
    assert (model.feature_strides, model.feature_dims) == ((4, 8, 16, 32), (10, 20, 40, 80))
    assert abstract(stem_stride=1).feature_strides == (1, 2, 4, 8)
    found = parameters(model)
    assert found["stem.conv1.conv.kernel"].shape == (3, 3, 3, 16)
    assert found["stages.1.parts.0.blocks.conv2.norm.var"].shape == (2, 20)
    assert found["stages.2.parts.0.blocks.mixer.qkv.kernel"].shape == (3, 40, 3, 4, 10)
    assert found["stages.2.downsample.kernel"].shape == (3, 3, 40, 80)
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype("float32")}


def test_drop_path_rises_over_all_blocks():
    rates = [rate for stage in abstract(drop_path_rate=0.7).stages for rate in stage.parts[0].drop_path_rates]
    np.testing.assert_allclose(rates, 0.1 * np.arange(8), atol=1e-7)


# ---------------------------------------------------------------------------- convolution and norm


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sides", [(5, 4), (1, 2)])
def test_padding_by_hand(stride, sides):
    """Of each output the nine products below it, zeros beyond the border; the window's centre on 0, stride, ..."""
    conv = Conv3x3(2, 3, stride=stride, use_bias=True, axes=(None, None), dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(3.0)
    x = np.asarray(images((1, *sides, 2)), np.float64)
    kernel = np.asarray(conv.kernel[...], np.float64)
    rows, cols = (len(range(0, side, stride)) for side in sides)
    expected = np.zeros((1, rows, cols, 3)) + np.arange(3)
    for y in range(rows):
        for x_ in range(cols):
            for i in range(3):
                for j in range(3):
                    row, col = y * stride + i - 1, x_ * stride + j - 1
                    if 0 <= row < sides[0] and 0 <= col < sides[1]:
                        expected[0, y, x_] += x[0, row, col] @ kernel[i, j]
    np.testing.assert_allclose(conv(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)
    assert conv.multiply_adds(rows * cols) == rows * cols * 9 * 2 * 3


def test_batch_norm_by_hand():
    norm, x = BatchNorm(3, rngs=nnx.Rngs(0)), 2 * images((4, 5, 3)) + 1
    norm.train()
    out = norm(x)
    mean, var = np.mean(x, (0, 1)), np.var(x, (0, 1))
    np.testing.assert_allclose(out, (x - mean) / np.sqrt(var + 1e-5), atol=1e-4)
    np.testing.assert_allclose(norm.mean[...], (1 - MOMENTUM) * mean, rtol=1e-4)
    np.testing.assert_allclose(norm.var[...], MOMENTUM + (1 - MOMENTUM) * var, rtol=1e-4)
    norm.eval()
    factor, summand = norm.affine()
    np.testing.assert_allclose(norm(x), factor * x + summand, atol=1e-5)
    # Statistics of 16-bit inputs are float32, too.
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("options", [{}, {"late_attention": True, "flips": True}])
def test_folded_is_unfolded(options):
    model = lively(**options)
    folded = fold_batch_norm(model)
    assert not jax.tree.leaves(batch_statistics(folded))
    assert jax.tree.leaves(batch_statistics(model))
    found, expected = (
        run(each, images(IMAGE), "intermediates", names=("stem", "features", "logits"))
        for each in (folded, model)
    )
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-5, name
    with pytest.raises(ValueError, match="no batch norm to fold; expected a pyramid that was not"):
        fold_batch_norm(folded)
