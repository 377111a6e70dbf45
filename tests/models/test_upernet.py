"""UPerNet: structure and sizes by hand, any size of image, no parameter without a gradient, one result on a mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.models.helpers import images, lively_with_statistics, parameters, relative_error
from vir_jax.models import create_model, flops
from vir_jax.models.interpolation import average_pool, enlarge
from vir_jax.models.pyramid import fold_batch_norm
from vir_jax.models.upernet import SIDES, PyramidUperNetReadout, UperNet, UperNetReadout
from vir_jax.models.variables import batch_statistics, split_variables
from vir_jax.parallel.mesh import make_mesh
from vir_jax.training.finetune import fit_params

DIMS, WIDTH, CLASSES = (8, 16, 24), 12, 5
GRIDS = ((9, 6), (5, 3), (3, 2))  # Of maps; odd ones are halved upwards.


@functools.cache
def abstract(name, **options):
    given = {"readout": "dense_upernet", "num_classes": CLASSES, "image_size": (12, 20)} | options
    return nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), **given))


def lively(make):
    """A module whose every parameter and statistic matters."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return nnx.merge(graph, lively_with_statistics(state))


def maps(batch=2, count=3):
    draw = np.random.default_rng(0).standard_normal
    shapes = ((batch, *grid, dim) for grid, dim in zip(GRIDS[-count:], DIMS[-count:], strict=True))
    return [jnp.asarray(draw(shape), jnp.float32) for shape in shapes]


@pytest.fixture(scope="module")
def decoder():
    model = lively(functools.partial(UperNet, DIMS, WIDTH, dtype="float32"))
    model.eval()
    return model


# ---------------------------------------------------------------------------- interpolation


@pytest.mark.parametrize("side", SIDES)
def test_bins_are_those_of_adaptive_pooling(side):
    x = np.asarray(images((1, 7, 3, 2)))
    expected = np.zeros((1, side, side, 2))
    for i in range(side):
        for j in range(side):
            rows = slice(7 * i // side, math.ceil(7 * (i + 1) / side))
            cols = slice(3 * j // side, math.ceil(3 * (j + 1) / side))
            expected[:, i, j] = x[:, rows, cols].mean(axis=(1, 2))
    np.testing.assert_allclose(average_pool(jnp.asarray(x), side), expected, atol=1e-6)


def test_what_is_below_and_to_the_right_is_left_out():
    x = images((1, 3, 2, 4))
    whole = enlarge(x, (6, 4), 2)
    np.testing.assert_array_equal(enlarge(x, (5, 3), 2), whole[:, :5, :3])
    np.testing.assert_allclose(whole, jax.image.resize(x, (1, 6, 4, 4), "bilinear"), atol=1e-6)
    # Fewer places: each takes those beside its centre, as PyTorch has it.
    np.testing.assert_allclose(enlarge(x, (1, 1), (1 / 3, 0.5))[0, 0, 0], x[0, 1].mean(axis=0), atol=1e-6)


# ---------------------------------------------------------------------------- structure


def test_features_by_hand(decoder):
    """From XLA's own convolutions and resizing, in another order of steps."""

    def conv(part, x):
        kernel, norm = part.conv.kernel[...], part.norm
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = (x - norm.mean[...]) / jnp.sqrt(norm.var[...] + 1e-5) * norm.scale[...] + norm.bias[...]
        return jnp.maximum(x, 0)

    def resize(x, grid):
        return jax.image.resize(x, (x.shape[0], *grid, x.shape[-1]), "bilinear", antialias=False)

    def double(x, grid):
        return resize(x, [2 * side for side in x.shape[1:3]])[:, : grid[0], : grid[1]]

    @jax.jit
    def expected(maps):
        fine, middle, coarse = maps
        averages = [
            resize(conv(part, average_pool(coarse, side)), GRIDS[2])
            for part, side in zip(decoder.pooled, SIDES, strict=True)
        ]
        top = conv(decoder.context, jnp.concatenate([coarse, *averages], -1))
        second = conv(decoder.lateral[1], middle) + double(top, GRIDS[1])
        first = conv(decoder.lateral[0], fine) + double(second, GRIDS[0])
        levels = [conv(decoder.smooth[0], first), double(conv(decoder.smooth[1], second), GRIDS[0])]
        # By 4 at once is not by 2 twice.
        levels.append(resize(top, [4 * side for side in GRIDS[2]])[:, : GRIDS[0][0], : GRIDS[0][1]])
        return conv(decoder.fuse, jnp.concatenate(levels, -1))

    graph, state = nnx.split(decoder)
    found = jax.jit(lambda state, maps: nnx.merge(graph, state)(maps))(state, maps())
    assert (found.shape, found.dtype) == ((2, *GRIDS[0], WIDTH), jnp.float32)
    assert relative_error(found, expected(maps())) < 1e-5
    folded = fold_batch_norm(decoder)
    assert not jax.tree.leaves(batch_statistics(folded))
    assert relative_error(folded(maps()), found) < 1e-5


def formula(dims, width):
    """Parameters of the decoder by its docstring."""
    n = len(dims)
    convolutions = width * (13 * dims[-1] + sum(dims[:-1])) + (36 + 9 * (n - 1) + 9 * n) * width**2
    return convolutions + 2 * width * (4 + 2 * n)


def count(module):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize(
    ("name", "expected"), [("vir_h_ti", 64_092_502), ("vir_h_s", 85_395_350), ("vir_s16", 62_560_758)]
)
def test_parameters(name, expected):
    """At 150 classes, as ADE20K has. Of the rest of the model those are counted elsewhere."""
    model, plain = (
        abstract(name, num_classes=150, image_size=224, readout=readout)
        for readout in ("dense_upernet", "average")
    )
    readout = model.readout
    if name == "vir_s16":
        dims, before = (512,) * 4, count(readout.pyramid)
    else:
        dims, before = model.feature_dims, sum(2 * dim for dim in model.feature_dims[:-1])
    assert count(readout.decoder) == formula(dims, 512)
    head = 150 * (512 + 1) - 150 * (model.dim + 1)
    assert count(model) == expected == count(plain) + before + formula(dims, 512) + head


def test_multiply_adds_are_those_that_are_compiled():
    """XLA counts two operations to one; those of interpolation, norms and so on are few besides."""
    for name in ("vir_h_nano", "vit_pico4"):
        model = abstract(name, readout_dim=256)
        plain = abstract(name, readout="average")
        readout, size = model.readout, (96, 160)
        if name == "vir_h_nano":
            grids = [layout.grid for layout in model._layouts(size)]
            x = [
                jax.ShapeDtypeStruct((1, *grid, dim), "float32")
                for grid, dim in zip(grids, model.feature_dims, strict=True)
            ]
            compute = functools.partial(PyramidUperNetReadout.of_stages, image_size=size)
        else:
            x, compute = jax.ShapeDtypeStruct((1, 24, 40, 64), "float32"), UperNetReadout.of_pixels
        graph, state = nnx.split(readout)
        lowered = jax.jit(lambda state, x: compute(nnx.merge(graph, state), x)).lower(state, x)  # noqa: B023
        counted = flops(model, size) - flops(plain, size) + CLASSES * model.dim
        assert lowered.cost_analysis()["flops"] / 2 == pytest.approx(counted, rel=0.05), name


# ---------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "sides"),
    [("vir_h_nano", (37, 50)), ("vir_h_nano", (1, 1)), ("vir_pico4", (12, 20)), ("vit_pico14", (14, 42))],
)
def test_each_pixel_has_logits_at_odd_sizes(name, sides):
    """Odd rows and columns of places, too, and fewer of them than bins."""
    image_size = (14, 14) if name == "vit_pico14" else (12, 20)
    model = abstract(name, readout_dim=8, image_size=image_size)
    graph, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((2, *sides, 3), "float32")
    logits = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, x)
    assert (logits.shape, logits.dtype) == ((2, *sides, CLASSES), jnp.float32)
    found = jax.eval_shape(lambda state, x: nnx.merge(graph, state).intermediates(x, ("logits",)), state, x)
    assert found["logits"] == logits
    assert (model.dense, model.num_classes, model.options["readout_dim"]) == (True, CLASSES, 8)
    assert "readout_dim" not in abstract(name, readout_dim=512, image_size=image_size).options
    assert parameters(model)["readout.decoder.fuse.conv.kernel"].shape == (3, 3, 4 * 8, 8)


def readouts():
    """Both, small, and what they read."""
    of_one = functools.partial(UperNetReadout, 8, CLASSES, patch=4, width=WIDTH, dtype="float32")
    of_stages = functools.partial(
        PyramidUperNetReadout, DIMS[1:], CLASSES, stride=2, width=WIDTH, dtype="float32"
    )
    yield of_one, UperNetReadout.of_pixels, images((2, 3, 2, 8))
    yield of_stages, functools.partial(PyramidUperNetReadout.of_stages, image_size=(9, 6)), maps(8, 2)


@pytest.mark.parametrize("which", [0, 1])
def test_every_parameter_has_a_gradient_and_every_statistic_moves(which):
    make, compute, x = list(readouts())[which]
    graph, params, others = split_variables(lively(make))

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            model = nnx.merge(graph, params, jax.lax.stop_gradient(others))
            model.train()
            return jnp.sum(jnp.square(compute(model, x) - 1)), batch_statistics(model)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    grads, statistics = gradients(params, x)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert jnp.all(jnp.isfinite(leaf)), path
        assert jnp.any(leaf != 0), path
    for old, new in zip(jax.tree.leaves(others), jax.tree.leaves(statistics), strict=True):
        assert np.all(old != new)


def test_a_mesh_changes_nothing():
    """Of eight images on eight devices: outputs and statistics are those of one device."""
    _, (make, compute, x) = readouts()
    graph, state = nnx.split(lively(make))

    @jax.jit
    def trained(state, x):
        model = nnx.merge(graph, state)
        model.train()
        return compute(model, x), batch_statistics(model)

    expected = trained(state, x)
    mesh = make_mesh(8)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        found = trained(jax.device_put(state, NamedSharding(mesh, PartitionSpec())), placed)
    for one, eight in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-4)


def test_large_kernels_say_how_they_are_split():
    """As `vir_jax.parallel.sharding` wants of those over 1 MB."""
    for name in ("vir_s16", "vir_h_ti"):
        flat = nnx.to_flat_state(nnx.state(abstract(name, image_size=224).readout, nnx.Param))
        silent = [path for path, leaf in flat if leaf.size > 2**18 and "axes" not in leaf.get_metadata()]
        assert not silent


@pytest.mark.parametrize("name", ["vir_pico4", "vir_h_nano"])
def test_no_stream_reads_the_whole_map(name):
    with pytest.raises(
        ValueError, match="readout='dense_upernet' cannot be streamed: its head averages the whole"
    ):
        abstract(name).check_streamable()


@pytest.mark.parametrize("name", ["vir_pico4", "vir_h_nano"])
def test_a_classifier_s_backbone_is_taken(name):
    """Its norm, too; what it does not have starts afresh, and so does the head."""
    plain, dense = (
        nnx.to_pure_dict(nnx.state(abstract(name, readout=readout, readout_dim=width)))
        for readout, width in (("average", None), ("dense_upernet", 8))
    )
    old = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), plain)
    fitted = fit_params(old, shapes=dense, head=None)
    new = set(parameters(abstract(name, readout_dim=8))) - fitted.keys()
    assert {".".join(path.split(".")[:2]) for path in new} == {
        "readout.decoder", "readout.head", "readout.norms" if name == "vir_h_nano" else "readout.pyramid",
    }  # fmt: skip
    del old["stem"]
    with pytest.raises(ValueError, match=r"other parameters than this one; only one of them has \['stem"):
        fit_params(old, shapes=dense, head=None)
