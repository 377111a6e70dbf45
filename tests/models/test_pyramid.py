"""Pyramids: exact sizes, padding by hand, one function in all modes, and what they refuse."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import images, lively_with_statistics, parameters, relative_error, run
from vir_jax.models import create_model, flops
from vir_jax.models.batch_norm import MOMENTUM, BatchNorm
from vir_jax.models.conv_stage import Conv
from vir_jax.models.pyramid import fold_batch_norm
from vir_jax.models.pyramid_variants import PYRAMID_SIZES
from vir_jax.models.variables import batch_statistics

SIDES = (21, 34)  # Neither is a multiple of the stride, 8.
IMAGE = (2, *SIDES, 3)
TINY = {"stem_stride": 1, "num_classes": 5, "image_size": SIDES}
# At 1000 classes: docs/pyramids.md. Multiply-adds at 224 pixels, mixing included.
PARAMETERS = {
    "vir_h_nano": (276_244, 61_484_448),
    "vir_h_micro": (623_704, 135_314_688),
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
    return nnx.merge(graph, lively_with_statistics(state))


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
    conv = Conv(2, 3, stride=stride, use_bias=True, axes=(None, None), dtype=jnp.float32, rngs=nnx.Rngs(0))
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


# ---------------------------------------------------------------------------- the model


OPTIONS = [
    {"retention": "2d", "late_attention": True, "directions": 4},
    {"flips": True, "chunk_size": 5, "layer_scale": 0.5},
]


@pytest.fixture(scope="module", params=OPTIONS, ids=str)
def computed(request):
    """Of a tiny pyramid: logits in every mode, feature maps, and all intermediates, compiled together."""
    model, x = lively(**request.param), images(IMAGE)
    graph, state = nnx.split(model)

    @jax.jit
    def compute(state):
        model = nnx.merge(graph, state)
        logits = {mode: model(x, mode=mode) for mode in model.modes}
        found = model.intermediates(x, model.intermediate_names, mode="parallel")
        return logits, model.feature_maps(x), model.feature_maps(x, norm=False)[-1], model.features(x), found

    return model, compute(state)


def test_all_modes_agree(computed):
    model, (logits, *_) = computed
    for mode in model.modes:
        assert relative_error(logits[mode], logits["parallel"]) < 1e-5, mode
        assert logits[mode].shape == (2, 5)
    with pytest.raises(ValueError, match="retention has no 'sideways' mode; expected one of 'auto', "):
        model(images(IMAGE), mode="sideways")


def test_feature_maps_are_the_stages_before_they_are_halved(computed):
    model, (_, maps, last, features, found) = computed
    sides = ((21, 34), (11, 17), (6, 9), (3, 5))
    assert [x.shape for x in maps] == [
        (2, *grid, dim) for grid, dim in zip(sides, model.feature_dims, strict=True)
    ]
    assert all(
        grid == tuple(-(-side // stride) for side in SIDES)
        for grid, stride in zip(sides, model.feature_strides, strict=True)
    )
    for i, depth in enumerate((2, 2, 3)):
        np.testing.assert_allclose(maps[i], found[f"stages.{i}.blocks.{depth - 1}.map"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(maps[3].reshape(features.shape), features, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(last, found["stages.3.blocks.0.map"], rtol=1e-3, atol=1e-3)
    with pytest.raises(
        ValueError, match=r"blocks=\(3,\): a pyramid has a map for each of its 4 stages, at strides"
    ):
        model.feature_maps(images(IMAGE), blocks=(3,))


def test_intermediates_by_name(computed):
    model, (logits, _, _, _, found) = computed
    assert set(found) == set(model.intermediate_names)
    assert found["stem"].shape == (2, 21, 34, 10)
    assert found["stages.1.blocks.0.map"].shape == (2, 11, 17, 20)
    assert found["stages.2.blocks.2.mixer.q"].shape == (2, 54, 4, 10)
    np.testing.assert_allclose(found["logits"], logits["parallel"], rtol=1e-4, atol=1e-4)
    # One block's output leads to the next one's.
    part = model.stages[2].parts[0]
    x = found["stages.2.blocks.0.map"].reshape(2, 54, 40)
    layout = model._layouts(SIDES)[2]
    x = layout.backwards(x) if part.flips else x
    x, _, _ = part.block(1)(x, layout)
    x = layout.backwards(x) if part.flips else x
    np.testing.assert_allclose(layout.patch_map(x), found["stages.2.blocks.1.map"], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"no intermediate is called 'blocks.0.tokens'; the nearest are"):
        model.intermediates(images(IMAGE), ("blocks.0.tokens",))


def test_late_attention_is_of_the_last_half():
    parts = [
        [(part.depth, type(part.blocks.mixer).__name__, part.flips) for part in stage.parts]
        for stage in abstract("vir_h_ti", late_attention=True, flips=True).stages[2:]
    ]
    assert parts == [
        [(4, "Retention", True), (4, "SoftmaxAttention", False)],
        [(2, "Retention", True), (2, "SoftmaxAttention", False)],
    ]
    # Rounded down: of one block none.
    assert [part.depth for stage in abstract(late_attention=True).stages[2:] for part in stage.parts] == [
        2,
        1,
        1,
    ]
    model = abstract(late_attention=True)
    grown = flops(model, SIDES) - flops(abstract(), SIDES)
    assert grown == 0  # Both count scores whole.


def test_any_size_of_image_down_to_a_pixel():
    model = abstract(stem_stride=None)
    graph, state = nnx.split(model)
    for sides in ((1, 1), (33, 64), (224, 20)):
        x = jax.ShapeDtypeStruct((1, *sides, 3), jnp.float32)
        maps = jax.eval_shape(lambda state, x: nnx.merge(graph, state).feature_maps(x), state, x)
        assert [m.shape[1:3] for m in maps] == [
            tuple(-(-side // stride) for side in sides) for stride in (4, 8, 16, 32)
        ]
        assert model.layout(sides).grid == maps[-1].shape[1:3]
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 4\)"):
        model(images((1, 8, 8, 4)))
    with pytest.raises(ValueError, match="0 x 8 pixels has none"):
        model.layout((0, 8))


def test_a_training_step_changes_statistics_and_loses_no_gradient():
    """With drop path: gradients of all parameters are finite, none is lost, and samples draw apart."""
    graph, params, others = nnx.split(lively(drop_path_rate=0.5), nnx.Param, ...)
    x = jnp.broadcast_to(images((1, 9, 8, 3)), (4, 9, 8, 3))

    @jax.jit
    def gradients(params, key):
        def loss(params):
            model = nnx.merge(graph, params, jax.lax.stop_gradient(others))
            model.train()
            logits = model(x, key=key)
            return jnp.sum(jnp.square(logits - 1)), (logits, batch_statistics(model))

        return jax.grad(loss, has_aux=True)(params)

    for seed in (0, 1):
        grads, (logits, statistics) = gradients(params, jax.random.key(seed))
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(grads)):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            assert jnp.all(jnp.isfinite(leaf)), name
            # The norm takes away what a bias before it adds.
            assert name.endswith(".conv.bias") or jnp.any(leaf != 0), name
    assert len(np.unique(np.asarray(logits), axis=0)) > 1
    before = nnx.to_pure_dict(nnx.state(nnx.merge(graph, params, others), nnx.BatchStat))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.to_pure_dict(statistics)), strict=True):
        assert np.all(old != new)


def test_bfloat16_is_close_to_float32():
    exact, rounded = (
        run(lively(dtype=dtype), images(IMAGE), "intermediates", names=("stem", "logits"))
        for dtype in ("float32", "bfloat16")
    )
    for name, value in exact.items():
        assert rounded[name].dtype == jnp.float32
        assert relative_error(rounded[name], value) < 3e-2


def test_what_isotropic_models_have_is_refused():
    for ask in (lambda model: model.mixer, lambda model: model.block(0)):
        with pytest.raises(ValueError, match="vir_h_nano is a pyramid: its stages differ in width"):
            ask(abstract())
