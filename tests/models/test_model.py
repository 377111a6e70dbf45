"""The skeleton: equal to its specification, the same in all modes, causal, pure, and clear in its errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from tests.models import reference
from tests.models.helpers import (
    GRID,
    IMAGE,
    abstract,
    create,
    fresh,
    images,
    lively,
    parameters,
    relative_error,
    run,
)
from vir_jax.models import stage
from vir_jax.models.stem import check_images, patch_grid
from vir_jax.ops import MODES, decay_mask, decay_mask_2d, vir_log_decay

VIR = [
    {"readout": "class_token"},
    {"readout": "average"},
    {"readout": "class_token", "retention": "2d"},
    {"readout": "class_token", "bidirectional": True},
    {"readout": "average", "bidirectional": True},
]
VIT = [{"readout": "class_token"}, {"readout": "average"}]


def label(options):
    return "-".join(map(str, options.values()))


@pytest.mark.parametrize("options", VIR, ids=label)
def test_vir_logits_equal_the_specification_in_every_mode(options):
    chunk = {} if options.get("retention") == "2d" else {"chunk_size": 5}
    model = lively("vir_pico2", image_size=(6, 8), **options, **chunk)
    x = images((2, 6, 8, 3))
    expected = reference.logits(parameters(model), x, patch=2, family="vir", depth=4, **options)
    for mode in MODES:
        logits = run(model, x, mode=mode)
        assert logits.dtype == jnp.float32
        assert relative_error(logits, expected) < 2e-5, mode


@pytest.mark.parametrize("options", VIT, ids=label)
def test_vit_logits_equal_the_specification(options):
    model = lively("vit_pico2", image_size=(6, 8), **options)
    x = images((2, 6, 8, 3))
    expected = reference.logits(parameters(model), x, patch=2, family="vit", depth=4, **options)
    assert relative_error(run(model, x, mode="parallel"), expected) < 2e-5


@pytest.mark.parametrize("name", ["vir_pico1", "vit_pico1"])
def test_logits_equal_the_specification_at_initialisation(name):
    """Here ViR's class token is of the order of 1e-6, and the epsilon of its norms decides the logits."""
    model, x, family = fresh(name), images(), name[:3]
    expected = reference.logits(parameters(model), x, patch=1, family=family, depth=4, readout="class_token")
    assert relative_error(run(model, x), expected) < 2e-5


@pytest.mark.parametrize("name", ["vir_pico2", "vit_pico2"])
def test_auto_is_a_mode_of_every_model(name):
    model, x = lively(name, image_size=(6, 8)), images((2, 6, 8, 3))
    assert relative_error(run(model, x), run(model, x, mode="parallel")) < 2e-5


@pytest.mark.parametrize("options", [{}, {"retention": "2d"}, {"bidirectional": True}], ids=label)
def test_class_token_depends_on_every_patch_at_initialisation(options):
    graph, params = nnx.split(fresh(**options))
    probe = jnp.asarray(np.random.default_rng(2).standard_normal(64), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.sum(nnx.merge(graph, params).features(x)[:, -1] @ probe)

    by_patch = jnp.linalg.norm(gradient(images()), axis=-1)
    assert jnp.all(by_patch > 1e-2 * jnp.max(by_patch)), by_patch


def changed_tokens(model, patch):
    """Which tokens' features change with the pixel of one patch of the grid."""
    x = images()
    before, after = run(model, x, "features"), run(model, x.at[:, *patch].add(1.0), "features")
    return np.asarray(jnp.any(before != after, axis=(0, 2)))


def test_1d_tokens_see_no_later_patch():
    changed = changed_tokens(lively(), (1, 2))
    np.testing.assert_array_equal(changed, np.arange(13) >= 4 + 2)


def test_2d_tokens_see_the_patches_above_and_to_the_left():
    changed = changed_tokens(lively(retention="2d"), (1, 2))
    y, x = np.indices(GRID)
    np.testing.assert_array_equal(changed, [*((y >= 1) & (x >= 2)).flat, True])


def test_second_pass_of_bidirectional_sees_all_patches():
    changed = changed_tokens(lively(bidirectional=True), (2, 3))
    np.testing.assert_array_equal(changed, [False] * 11 + [True] * 14)


@pytest.mark.parametrize("name", ["vir_pico2", "vit_pico2"])
def test_images_of_other_sizes_use_resampled_position_embeddings(name):
    model = lively(name, image_size=(8, 8))
    other = lively(name, image_size=(6, 12))
    embedding = jax.image.resize(model.stem.position.embedding[...], (1, 3, 6, 64), "bicubic")
    _, params = nnx.split(model)
    params["stem"]["position"]["embedding"] = nnx.Param(embedding)
    nnx.update(other, params)
    x = images((2, 6, 12, 3))
    assert (model.stem.position.grid, other.stem.position.grid) == ((4, 4), (3, 6))
    np.testing.assert_allclose(run(model, x), run(other, x), rtol=1e-5, atol=1e-5)


def test_state_is_float32_parameters_alone():
    for name, dtype in (("vir_pico1", jnp.bfloat16), ("vit_pico1", jnp.float32)):
        _, params, rest = nnx.split(abstract(name, dtype=dtype, drop_path_rate=0.5), nnx.Param, ...)
        assert not jax.tree.leaves(rest)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_parameter_paths_are_those_that_rules_are_written_on():
    block = {
        "norm1.scale": (4, 64), "norm1.bias": (4, 64), "norm2.scale": (4, 64), "norm2.bias": (4, 64),
        "mixer.qkv.kernel": (4, 64, 3, 4, 16), "mixer.qkv.bias": (4, 3, 4, 16),
        "mixer.out.kernel": (4, 4, 16, 64), "mixer.out.bias": (4, 64),
        "mlp.up.kernel": (4, 64, 256), "mlp.up.bias": (4, 256),
        "mlp.down.kernel": (4, 256, 64), "mlp.down.bias": (4, 64),
    }  # fmt: skip
    shared = {
        "stem.embedding.conv.kernel": (1, 1, 3, 64), "stem.embedding.conv.bias": (64,),
        "stem.position.embedding": (1, *GRID, 64), "stem.class_token": (1, 1, 64),
        "readout.norm.scale": (64,), "readout.norm.bias": (64,),
        "readout.head.kernel": (64, 5), "readout.head.bias": (5,),
        **{f"stage.blocks.{path}": shape for path, shape in block.items()},
    }  # fmt: skip
    scales = {f"stage.blocks.layer_scale{j}.scale": (4, 64) for j in (1, 2)}
    for name, expected in (
        ("vir_pico1", shared | scales),
        ("vit_pico1", shared | {"stem.class_position_embedding": (1, 1, 64)}),
    ):
        assert {path: leaf.shape for path, leaf in parameters(abstract(name)).items()} == expected


def test_graph_is_the_same_whether_abstract_or_not():
    assert nnx.graphdef(abstract(drop_path_rate=0.1)) == nnx.graphdef(create(drop_path_rate=0.1))


def test_one_block_by_itself():
    model = lively()
    names = ["tokens", *(f"blocks.{index}.tokens" for index in range(4))]
    x, *after = model.intermediates(images((1, *GRID, 3)), names).values()
    for index in range(4):
        kernel = model.block(index).mlp.up.kernel[...]
        np.testing.assert_array_equal(kernel, model.stage.blocks.mlp.up.kernel[...][index])
        x, _, _ = model.block(index)(x, model.layout(GRID))
        assert relative_error(after[index], x) < 1e-6
    with pytest.raises(IndexError, match="layer 4: the stage has layers 0 to 3"):
        model.block(4)


def test_drop_path_rises_linearly_and_is_drawn_from_the_key():
    model = lively(drop_path_rate=0.6)
    np.testing.assert_allclose(model.stage.drop_path_rates, [0.0, 0.2, 0.4, 0.6], rtol=1e-6)
    x = jnp.broadcast_to(images((1, *GRID, 3)), (8, *GRID, 3))
    first, again, other = (run(model, x, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.any(first != other)
    assert len(np.unique(np.asarray(first), axis=0)) > 1, "each sample draws for itself"
    evaluated = run(model, x)
    assert len(np.unique(np.asarray(evaluated), axis=0)) == 1
    np.testing.assert_array_equal(evaluated, run(lively(), x))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize(("name", "scores"), [("vir_pico1", 0), ("vit_pico1", 1)])
def test_products_are_kept_for_the_backward_pass_and_the_rest_computed_anew(name, scores):
    """The backward pass has the products of attention's scores again, and no other; each of PRODUCTS saves some."""

    def products(remat):
        graph, params = nnx.split(lively(name, remat=remat))
        loss = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(images()) ** 2)))
        return sum(equation.primitive.name == "dot_general" for equation in equations(loss(params).jaxpr))

    everything = products("none")
    assert products("elementwise") == everything + scores
    assert products("full") > everything + scores


def test_remat_changes_no_gradient():
    x, key = images(), jax.random.key(3)

    def gradients(remat):
        graph, params = nnx.split(lively(drop_path_rate=0.5, remat=remat))
        return jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(x, key=key) ** 2)))(params)

    kept = gradients("none")
    for remat in ("elementwise", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients(remat), kept
        )


@pytest.mark.parametrize("remat", ["elementwise", "full"])
def test_the_loop_written_out_for_a_gpu_is_the_loop(monkeypatch, remat):
    """In training: the same gradients, and barriers keep recomputation apart from the forward pass."""
    graph, params = nnx.split(lively("vit_pico1", drop_path_rate=0.5, remat=remat))

    def step():
        def loss(params):
            return jnp.sum(nnx.merge(graph, params)(images(), key=jax.random.key(3)) ** 2)

        lowered = jax.jit(jax.grad(loss)).lower(params)
        compiled = lowered.compile()
        loops = [line for line in compiled.as_text().splitlines() if " while(" in line]
        loops_over_blocks = sum(bool(re.search(r'_scan\)+/while"', loop)) for loop in loops)
        return loops_over_blocks, "optimization_barrier" in lowered.as_text(), compiled(params)

    *program, gradients = step()
    assert program == [2, False]  # forward and backward
    monkeypatch.setattr(stage, "platform", lambda: "gpu")
    *program, of_gpu = step()
    assert program == [0, True]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), of_gpu, gradients)


@pytest.mark.parametrize(
    ("name", "options"), [("vir_pico1", {}), ("vir_pico1", {"retention": "2d"}), ("vit_pico1", {})]
)
def test_bfloat16_is_close_to_float32(name, options):
    x = images((4, *GRID, 3))
    exact, rounded = (
        run(lively(name, dtype=dtype, **options), x, "intermediates", names=("features", "logits"))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    for key in ("features", "logits"):
        assert rounded[key].dtype == jnp.float32
        assert relative_error(rounded[key], exact[key]) < 2e-2


def test_bfloat16_does_not_round_away_what_layer_scale_lets_through():
    names = ("tokens", "blocks.3.tokens")
    updates = []
    for dtype in (jnp.float32, jnp.bfloat16):
        found = run(fresh(dtype=dtype), images(), "intermediates", names=names)
        updates.append(found["blocks.3.tokens"] - found["tokens"])
    assert relative_error(updates[1], updates[0]) < 3e-2


@pytest.mark.parametrize("options", [{}, {"retention": "2d"}, {"bidirectional": True}], ids=label)
def test_every_intermediate_can_be_asked_for_by_name(options):
    model = lively(**options)
    x = images()
    names, one_name = model.intermediate_names, "blocks.2.mixer.head_outputs"
    graph, params = nnx.split(model)

    @jax.jit
    def compute(params):
        model = nnx.merge(graph, params)
        return model.intermediates(x, names), model.intermediates(x, (one_name,)), model(x), model.features(x)

    found, one, logits, features = compute(params)
    n = 25 if options.get("bidirectional") else 13
    shapes = {"patch_tokens": (2, 12, 64), "logits": (2, 5)}
    per_head = {
        f"blocks.{i}.mixer.{name}": (2, n, 4, 16)
        for i in range(4)
        for name in ("q", "k", "v", "head_outputs")
    }
    expected = dict.fromkeys(names, (2, n, 64)) | shapes | per_head
    assert {name: value.shape for name, value in found.items()} == expected

    np.testing.assert_allclose(found["logits"], logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["features"], features, rtol=1e-5, atol=1e-5)
    assert list(one) == [one_name]
    np.testing.assert_allclose(one[one_name], found[one_name], rtol=1e-5, atol=1e-5)

    decay = vir_log_decay(4)
    mask = decay_mask_2d(GRID, decay, trailing=1) if options.get("retention") else decay_mask(n, decay)
    q, k, v = (found[f"blocks.2.mixer.{name}"] for name in "qkv")
    heads = jnp.einsum("bnhd,bmhd,hnm,bmhe->bnhe", q / 4, k, mask, v)
    np.testing.assert_allclose(one[one_name], heads, rtol=1e-4, atol=1e-4)


def test_intermediates_are_kept_under_remat_too():
    names = ("blocks.1.mixer.q", "blocks.3.tokens")
    plain, remat = (
        run(lively(remat=remat), images(), "intermediates", names=names) for remat in ("elementwise", "full")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), remat, plain)


def test_unknown_intermediate_names_the_nearest():
    with pytest.raises(ValueError, match=r"'blocks\.1\.mixer\.head_output'.*blocks\.1\.mixer\.head_outputs"):
        lively().intermediates(images(), ("logits", "blocks.1.mixer.head_output"))


def test_errors_name_what_came_and_what_to_do():
    model = lively("vir_pico4", image_size=8)
    with pytest.raises(ValueError, match=r"10 x 8 pixels.*4 x 4.*e\.g\. 8 x 8"):
        model(images((1, 10, 8, 3)))
    with pytest.raises(ValueError, match="0 x 8 pixels"):
        patch_grid((0, 8), 4)
    with pytest.raises(
        ValueError, match="retention has no 'sideways' mode; expected one of 'auto', 'parallel'"
    ):
        model(images((1, 8, 8, 3)), mode="sideways")
    for shape in ((1, 8, 8, 4), (8, 8, 3)):
        with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*\[b, H, W, 3\]"):
            check_images(shape, jnp.dtype("float32"), 3)
    with pytest.raises(ValueError, match=r"\(0, 8, 8, 3\): an empty batch"):
        check_images((0, 8, 8, 3), jnp.dtype("float32"), 3)
    with pytest.raises(ValueError, match=r"uint8.*floating point"):
        check_images(IMAGE, jnp.dtype("uint8"), 3)
