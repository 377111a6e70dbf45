"""Each option of retention: what it computes, and that modes, gradients and states remain equal."""

import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import (
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
from vir_jax.models import create_model, flops
from vir_jax.models.layout import Layout
from vir_jax.ops import MODES, retnet_log_decay, vir_log_decay
from vir_jax.ops.reference import naive_retention, naive_retention_2d
from vir_jax.runs.config import default_config
from vir_jax.runs.validate import validate

ALL = {"decays": "token", "qk_norm": "layer", "head_norm": True, "gate": True, "short_conv": 4}
OPTIONS = {
    "vir": {},
    "retnet": {"decays": "retnet"},
    "none": {"decays": "none"},
    "learned": {"decays": "learned"},
    "token": {"decays": "token"},
    "qk_norm": {"qk_norm": "rms"},
    "head_norm": {"head_norm": True},
    "gate": {"gate": True},
    "short_conv": {"short_conv": 3},
    "directions": {"directions": 2, "decays": "token"},
    "corners": {"directions": 4, "retention": "2d", "short_conv": 2},
    "all": ALL,
    "all in 2d": ALL | {"decays": "learned", "retention": "2d", "qk_norm": "rms"},
}
WHOLE = Layout(cols=4, patches=12, class_token="last")
PIECES = {"1d": [1, 2, 9, 0], "2d": [4, 8, 0]}  # Some shorter than the convolution.
FP32 = 2e-5


def reference(p, x, options):
    """The mixer's output in float64, by the loops of the specification."""
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    x = np.asarray(x, np.float64)
    if "short_conv" in options:
        padded = np.pad(x, ((0, 0), (options["short_conv"] - 1, 0), (0, 0)))
        for n in range(x.shape[1]):
            window = padded[:, n : n + options["short_conv"]][:, ::-1]
            x[:, n] += np.einsum("bwc,wc->bc", window, p["short_conv.kernel"])
    q, k, v = np.einsum("bnc,cthd->tbnhd", x, p["qkv.kernel"]) + p["qkv.bias"][:, None, None]
    if "qk_norm" in options:
        q, k = (_normed(y, options["qk_norm"]) * p[f"{name}_norm.scale"] for name, y in (("q", q), ("k", k)))
    log_decay = {
        "vir": lambda: np.asarray(vir_log_decay(4)),
        "retnet": lambda: np.asarray(retnet_log_decay(4)),
        "none": lambda: np.zeros(4),
        "learned": lambda: -np.log1p(np.exp(-p["decay.logit"])),
        "token": lambda: -np.log1p(np.exp(-(x @ p["decay.logit.kernel"] + p["decay.logit.bias"]))),
    }[options.get("decays", "vir")]()
    heads = np.empty_like(v)
    for head in range(4):  # Each by itself, of the tokens in the order in which it reads them.
        order = read_order(head, options.get("directions", 1))
        one = [x[:, order, head : head + 1] for x in (q, k, v)]
        decay = log_decay[..., head : head + 1]
        if "retention" in options:
            out, _ = naive_retention_2d(*one, decay, (3, 4))
        else:
            out, _ = naive_retention(*one, decay[:, order] if decay.ndim == 3 else decay)
        heads[:, order, head : head + 1] = out
    if "head_norm" in options:
        heads = _normed(heads, "rms")
    if "gate" in options:
        gate = np.einsum("bnc,chd->bnhd", x, p["gate.kernel"]) + p["gate.bias"]
        heads = heads * gate / (1 + np.exp(-gate))
    return np.einsum("bnhd,hdc->bnc", heads, p["out.kernel"]) + p["out.bias"]


def read_order(head, directions):
    """The patches of a grid of 3 x 4 as a head reads them, and the class token."""
    patches = np.arange(12).reshape(3, 4)
    flips = {1: [()] * 4, 2: [(), (0, 1)] * 2, 4: [(), (0, 1), 0, 1]}[directions]
    return [*np.flip(patches, flips[head]).ravel(), 12]


def _normed(x, kind):
    x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


@functools.cache
def mixer_of(name):
    mixer = lively(**OPTIONS[name]).block(0).mixer
    if hasattr(
        mixer.decay, "logit"
    ):  # Else half of a token's neighbour is forgotten, and all that is farther.
        bias = mixer.decay.logit.bias if OPTIONS[name]["decays"] == "token" else mixer.decay.logit
        bias[...] += 3.0
    return mixer


@pytest.mark.parametrize("name", OPTIONS)
def test_every_mode_is_the_reference_and_has_the_same_gradients_and_state(name):
    mixer, x = mixer_of(name), images((2, 13, 64))
    graph, params = nnx.split(mixer)
    d_out = images((3, 13, 64))[1:]

    @jax.jit
    def results(params):
        def of_mode(mode):
            def loss(params, x):
                mixer = nnx.merge(graph, params)
                out, state, _ = mixer(x, WHOLE, mode=mode, return_state=mixer.causal)
                return jnp.sum(out * d_out), (out, state)

            return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

        return {mode: of_mode(mode) for mode in MODES}

    by_mode = results(params)
    expected = reference(parameters(mixer), x, OPTIONS[name])
    (_, (_, state)), gradients = by_mode["parallel"]
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert jnp.any(leaf != 0), path
    for mode in MODES:
        (_, (out, end)), ours = by_mode[mode]
        assert relative_error(out, expected) < FP32
        for (path, leaf), other in zip(
            jax.tree.leaves_with_path((end, ours)), jax.tree.leaves((state, gradients)), strict=True
        ):
            assert relative_error(leaf, other) < FP32, (mode, path)


@pytest.mark.parametrize("name", ["token", "short_conv", "all", "all in 2d"])
def test_a_sequence_in_pieces_is_the_whole(name):
    mixer, x = mixer_of(name), images((2, 13, 64))
    graph, params = nnx.split(mixer)

    @jax.jit
    def whole_and_pieces(params):
        mixer = nnx.merge(graph, params)
        whole, end, _ = mixer(x, WHOLE, return_state=True)
        outputs, state, start = [], mixer.initial_state(2, WHOLE), 0
        for patches in PIECES[OPTIONS[name].get("retention", "1d")]:
            layout = WHOLE.piece(start, patches, class_token=None if patches else "last")
            out, state, _ = mixer(x[:, start : start + layout.length], layout, state=state, return_state=True)
            outputs.append(out)
            start += patches
        return (whole, end), (jnp.concatenate(outputs, axis=1), state)

    whole, pieces = whole_and_pieces(params)
    assert jax.tree.structure(whole) == jax.tree.structure(pieces)
    for actual, expected in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        assert actual.dtype == jnp.float32
        assert relative_error(actual, expected) < FP32


def test_flips_turn_the_patches_for_every_second_block():
    model, x = lively(flips=True), images()
    names = ("tokens", "blocks.1.mixer.q", *(f"blocks.{i}.tokens" for i in range(4)), "logits")
    found = run(model, x, "intermediates", names=names)

    def turned(x):
        return jnp.concatenate([x[:, -2::-1], x[:, -1:]], axis=1)

    @jax.jit
    def one_by_one(x):
        tokens = []
        for i in range(4):
            x = turned(x) if i % 2 else x
            x, _, of_mixer = model.block(i)(x, WHOLE)
            x, q = (turned(y) if i % 2 else y for y in (x, of_mixer["mixer.q"]))
            tokens.append((x, q))
        return tokens

    expected = one_by_one(found["tokens"])
    for i in range(4):
        assert relative_error(found[f"blocks.{i}.tokens"], expected[i][0]) < FP32
    assert relative_error(found["blocks.1.mixer.q"], expected[1][1]) < FP32
    for mode in MODES:
        assert relative_error(run(model, x, mode=mode), found["logits"]) < FP32
    assert relative_error(run(lively(), x), found["logits"]) > 1e-2
    with pytest.raises(ValueError, match="made with flips=True cannot be streamed"):
        model.apart()


@pytest.mark.parametrize(("directions", "kind"), [(1, "1d"), (2, "1d"), (2, "2d"), (4, "2d")])
def test_which_patches_a_patch_sees(directions, kind):
    """Of one block, by its gradient: its own and those before it, all, or of two corners a quarter each."""
    mixer = lively(directions=directions, retention=kind, decays="none").block(0).mixer

    @jax.jit
    def seen(x):
        of_one = jax.grad(lambda x: jnp.sum(mixer(x, WHOLE)[0][0, 6]))(x)[0]
        return jnp.any(of_one != 0, axis=-1)

    x, y = np.divmod(np.arange(12), 4)
    expected = {
        (1, "1d"): np.arange(12) <= 6,
        (2, "1d"): np.full(12, True),
        (2, "2d"): ((x <= 1) & (y <= 2)) | ((x >= 1) & (y >= 2)),
        (4, "2d"): np.full(12, True),
    }[directions, kind]
    np.testing.assert_array_equal(seen(images((1, 13, 64))), [*expected, False])


def test_directions_leave_no_state():
    model = lively(directions=2)
    with pytest.raises(ValueError, match="retention with directions=2 has no state: half of the heads"):
        model.block(0).mixer(images((2, 13, 64)), WHOLE, return_state=True)
    with pytest.raises(ValueError, match="whose mixer is retention with directions=2 cannot be streamed"):
        model.apart()


def test_flips_of_an_odd_number_of_blocks_end_as_they_began():
    model, x = lively(flips=True), images((2, 13, 64))
    stage = model.stage
    graph, params = nnx.split(stage.blocks)
    whole, _ = stage(x, WHOLE)
    stage.blocks = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[:3], params))
    stage.depth, stage.drop_path_rates = 3, stage.drop_path_rates[:3]
    three, _ = stage(x, WHOLE)
    fourth, _, _ = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[3], params))(WHOLE.backwards(three), WHOLE)
    assert relative_error(WHOLE.backwards(fourth), whole) < FP32


@pytest.mark.parametrize(
    ("name", "turned"),
    [("all", {"flips": True}), ("all in 2d", {"flips": True}), ("all", {"directions": 2})],
    ids=str,
)
def test_bfloat16_is_near(name, turned):
    x = images((4, *IMAGE[1:]))
    exact, rounded = (
        run(lively(**OPTIONS[name], **turned, dtype=dtype), x) for dtype in ("float32", "bfloat16")
    )
    assert jnp.all(jnp.isfinite(rounded))
    assert relative_error(rounded, exact) < 5e-2


ADDED = {  # In each block, of 64 channels and 4 heads of 16.
    "retnet": {},
    "none": {},
    "learned": {"decay.logit": 4},
    "token": {"decay.logit.kernel": 64 * 4, "decay.logit.bias": 4},
    "qk_norm": {"q_norm.scale": 16, "k_norm.scale": 16},
    "head_norm": {},
    "gate": {"gate.kernel": 64 * 64, "gate.bias": 64},
    "short_conv": {"short_conv.kernel": 3 * 64},
    "corners": {"short_conv.kernel": 2 * 64},
}


@pytest.mark.parametrize("name", ADDED)
def test_parameters_that_an_option_adds(name):
    def sizes(**options):
        return {path: math.prod(leaf.shape) for path, leaf in parameters(abstract(**options)).items()}

    added = {f"stage.blocks.mixer.{path}": 4 * size for path, size in ADDED[name].items()}
    assert sizes(**OPTIONS[name]) == sizes() | added


@pytest.mark.parametrize("decays", ["learned", "token"])
def test_decays_begin_at_those_of_vir(decays):
    mixer = jax.jit(
        lambda: nnx.state(create_model("vir_pico1", num_classes=5, rngs=nnx.Rngs(0), decays=decays))
    )()
    logit = mixer["stage"]["blocks"]["mixer"]["decay"]["logit"]
    start = logit["bias"][...] if decays == "token" else logit[...]
    expected = np.broadcast_to(vir_log_decay(4), (4, 4))
    np.testing.assert_allclose(jax.nn.log_sigmoid(start), expected, rtol=1e-5)
    if decays == "token":
        assert abs(float(jnp.std(logit["kernel"][...])) - 0.02) < 2e-3


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"qk_norm": True}, r"qk_norm=True; expected one of \(None, 'rms', 'layer'\)"),
        ({"head_norm": "rms"}, r"head_norm='rms'; expected one of \(True, False\)"),
        ({"gate": 1}, r"gate=1; expected one of \(True, False\)"),
        ({"short_conv": True}, "short_conv=True; expected a width of 2 or more tokens, or None"),
        ({"directions": True}, r"directions=True; expected one of \(1, 2, 4\)"),
    ],
    ids=str,
)
def test_values_of_other_types_are_refused(option, reason):
    """As a config has them: the type checker of the tests, which would refuse them first, is off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=reason):
            nnx.eval_shape(lambda: create(**option))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_options_that_are_off_are_no_options():
    off = {
        "decays": "vir",
        "qk_norm": None,
        "head_norm": False,
        "gate": False,
        "short_conv": None,
        "directions": 1,
    }
    assert abstract(**off).options == abstract().options
    assert nnx.graphdef(abstract(**off, flips=False)) == nnx.graphdef(abstract())
    assert fresh(head_norm=True).options == abstract().options | {"head_norm": True}


def test_cost_counts_gate_decays_and_convolution():
    n, c, depth = 17, 64, 4
    plain = flops(abstract(image_size=4), 4)
    assert (
        flops(abstract(image_size=4, qk_norm="rms", head_norm=True, decays="learned", flips=True), 4) == plain
    )
    assert flops(abstract(image_size=4, directions=2), 4) == plain
    assert flops(abstract(image_size=4, gate=True), 4) - plain == depth * n * c * c
    assert flops(abstract(image_size=4, decays="token"), 4) - plain == depth * n * c * 4
    assert flops(abstract(image_size=4, short_conv=3), 4) - plain == depth * n * c * 3
    everything = flops(abstract(image_size=4, **ALL), 4, mode="recurrent")
    assert everything - flops(abstract(image_size=4), 4, mode="recurrent") == depth * n * c * (c + 4 + 4)


def test_a_config_sets_them():
    config = default_config()
    for option, value in (ALL | {"flips": True}).items():
        config.model[option] = value
    validate(config)
    config.model.name, config.model.image_size = "vir_pico1", (4, 4)
    model = nnx.eval_shape(lambda: create_model(**config.model, num_classes=5, rngs=nnx.Rngs(0)))
    assert model.options.items() >= (ALL | {"flips": True}).items()
