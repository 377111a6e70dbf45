"""One contract for all mixers, and what each refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import GRID, images, lively, relative_error, run
from tests.ops.cases import KERNELS, NEEDS
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import Mixer, mixer_names, mixer_options, mixer_type, register
from vir_jax.models.mixers.retention import Retention
from vir_jax.models.variables import split_variables
from vir_jax.ops import MODES, kernels

WHOLE = Layout(cols=4, patches=12, class_token="last")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("retention", "pieces"), [("1d", [5, 7, 0]), ("2d", [8, 4, 0])], ids=["1d", "2d"])
def test_a_block_continues_from_the_state_of_the_tokens_before(retention, pieces, mode):
    """Patches piece by piece, then the class token alone: what streaming inference rests on."""
    graph, params = nnx.split(lively(retention=retention).block(0))
    x = images((2, 13, 64))

    @jax.jit
    def whole_and_pieces(params):
        block = nnx.merge(graph, params)
        whole, end, _ = block(x, WHOLE, mode=mode, return_state=True)
        outputs, state, start = [], None, 0
        for patches in pieces:
            layout = WHOLE.piece(start, patches, class_token=None if patches else "last")
            tokens = x[:, start : start + layout.length]
            out, state, _ = block(tokens, layout, mode=mode, state=state, return_state=True)
            outputs.append(out)
            start += patches
        return (whole, end), (jnp.concatenate(outputs, axis=1), state)

    whole, continued = whole_and_pieces(params)
    for actual, expected in zip(continued, whole, strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_give_the_same_model(implementation):
    logits = run(lively(implementation=implementation), images())
    np.testing.assert_allclose(logits, run(lively(), images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", [pytest.param("cpp_cpu", marks=NEEDS["cpu"])])
def test_kernels_give_the_same_model_in_2d(implementation):
    logits = run(lively(implementation=implementation, retention="2d"), images())
    np.testing.assert_allclose(logits, run(lively(retention="2d"), images()), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels_run")
def test_a_kernel_gives_the_same_gradients():
    def gradients(implementation):
        graph, params = nnx.split(lively(implementation=implementation, decays="learned"))
        return jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(images()) ** 2)))(params)

    jax.tree.map(
        lambda actual, expected: np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4),
        gradients("pallas_tpu"),
        gradients("xla"),
    )


def test_a_kernel_is_asked_for():
    name, platform = next(each for each in kernels.PLATFORMS.items() if each[1] != jax.default_backend())
    with pytest.raises(ValueError, match=f"'{name}' is a kernel for {platform}"):
        lively(implementation=name)(images((3, *GRID, 3)))  # not a shape that another test has compiled


def test_no_state_unless_asked_for():
    _, state, _ = lively().block(0)(images((1, 13, 64)), WHOLE)
    assert state is None


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="dim=10 is not divisible by heads=3"):
        Retention(10, 3, WHOLE, dtype=jnp.float32, rngs=nnx.Rngs(0))


# ---------------------------------------------------------------------------- every mixer, every part of the contract

MIXERS = mixer_names()


def of(mixer, **options):
    """A tiny model with the mixer, every parameter of which matters."""
    name = "vir_pico1" if mixer_type(mixer).causal else "vit_pico1"
    return lively(name, mixer=mixer, **options)


@pytest.mark.parametrize("mixer", MIXERS)
def test_all_modes_agree(mixer):
    model, x = of(mixer), images()
    expected = run(model, x, mode=model.modes[0])
    for mode in ("auto", *model.modes):
        assert relative_error(run(model, x, mode=mode), expected) < 2e-5, mode
    with pytest.raises(ValueError, match=f"{mixer} has no 'sideways' mode; expected one of 'auto', "):
        model(x, mode="sideways")


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_are_finite_and_none_is_lost(mixer):
    graph, params, others = split_variables(of(mixer))
    loss = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params, others)(images()) ** 2)))
    grads = loss(params)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert jnp.all(jnp.isfinite(leaf)), path
        assert jnp.any(leaf != 0), path


@pytest.mark.parametrize("mixer", MIXERS)
def test_any_size_of_image_and_both_dtypes(mixer):
    if mixer_type(mixer).reads_any_length:
        assert run(of(mixer), images((1, 2, 5, 3))).shape == (1, 5)
    else:
        with pytest.raises(ValueError, match=r"made for images of \(3, 4\) patches, got \(2, 5\)"):
            of(mixer)(images((1, 2, 5, 3)))
    x = images((4, *GRID, 3))
    exact, rounded = (run(of(mixer, dtype=dtype), x) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == jnp.float32
    assert relative_error(rounded, exact) < 3e-2


@pytest.mark.parametrize("mixer", MIXERS)
def test_streams_or_says_why_not(mixer):
    model = of(mixer)
    if not mixer_type(mixer).causal:
        with pytest.raises(
            ValueError, match=f"whose mixer is {mixer_type(mixer).__name__} cannot be streamed"
        ):
            model.apart()
        mixer = model.block(0).mixer
        with pytest.raises(ValueError, match="no state that summarises earlier tokens"):
            mixer.initial_state(1, WHOLE)
        with pytest.raises(ValueError, match="no state that summarises earlier tokens"):
            mixer(images((1, 13, 64)), WHOLE, return_state=True)
        return
    apart, x = model.apart(), images((2, 13, 64))
    state = apart.blocks.initial_state(2, WHOLE)
    outputs, start = [], 0
    for patches in (4, 8, 0):
        layout = WHOLE.piece(start, patches, class_token=None if patches else "last")
        out, state = apart.blocks(x[:, start : start + layout.length], layout, state)
        outputs.append(out)
        start += patches
    whole, _ = model.stage(x, WHOLE)
    assert relative_error(jnp.concatenate(outputs, axis=1), whole) < 2e-5


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_causal_mixer_sees_no_later_token_and_the_others_all(mixer):
    model = of(mixer)
    block, layout = model.block(0), model.layout(GRID)
    x = images((1, layout.length, 64))
    # Of one channel: what is added to all of them layer norm takes away, but for rounding.
    before, after = (block(y, layout)[0] for y in (x, x.at[:, 6, 0].add(1.0)))
    changed = np.asarray(jnp.any(before != after, axis=(0, 2)))
    np.testing.assert_array_equal(
        changed, np.arange(len(changed)) >= 6 if mixer_type(mixer).causal else np.ones(len(changed), bool)
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_cost_and_intermediates_are_told(mixer):
    model = of(mixer)
    for mode in model.modes:
        assert model.stage.blocks.mixer.multiply_adds(model.layout(GRID), mode) > 0
    names = [name for name in model.intermediate_names if name.startswith("blocks.2.")]
    assert names[-1] == "blocks.2.tokens"
    found = run(model, images(), "intermediates", names=tuple(names))
    assert all(value.shape[:2] == (2, model.layout(GRID).length) for value in found.values())


def test_fnet_is_the_real_part_of_a_fourier_transform():
    x = images((2, 13, 64))
    mixed, _, _ = of("fnet").block(0).mixer(x, WHOLE)
    np.testing.assert_allclose(mixed, np.fft.fft2(np.asarray(x, np.float64)).real, rtol=1e-4, atol=1e-3)


def test_fnet_adds_no_parameter():
    assert not jax.tree.leaves(nnx.state(of("fnet").block(0).mixer))


def test_fnet_is_two_sums_of_cosines_and_sines_and_twice_it_adds_the_mirror_image():
    mixer, layout = of("fnet").block(0).mixer, Layout(cols=4, patches=12, class_token="first")
    x, other = images((1, 13, 64)), images((2, 13, 64))[1:]
    (cos_n, sin_n), (cos_c, sin_c) = (
        (np.cos(angles), np.sin(angles))
        for angles in (2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n for n in (13, 64))
    )
    once, sums = mixer(x, layout)[0], mixer(2 * x + other, layout)[0]
    assert relative_error(once, cos_n @ np.asarray(x) @ cos_c - sin_n @ np.asarray(x) @ sin_c) < 1e-5
    assert relative_error(sums, 2 * once + mixer(other, layout)[0]) < 1e-5
    mirrored = np.roll(np.asarray(x)[:, ::-1, ::-1], (1, 1), (1, 2))
    assert relative_error(mixer(once, layout)[0], 13 * 64 * (x + mirrored) / 2) < 1e-5


def test_options_are_read_from_the_signature():
    off = {"retention": None, "chunk_size": None, "implementation": None, "qk_norm": None, "short_conv": None}
    on = {"decays": "vir", "head_norm": False, "gate": False, "directions": 1}
    assert mixer_options("retention") == off | on
    assert mixer_options("fnet") == {}


def test_two_mixers_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two mixers called 'fnet'"):

        @register("fnet")
        class Other(Mixer):
            pass
