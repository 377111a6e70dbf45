"""Programs for machines without vir_jax give what the model gives."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from vir_jax.deploy import (
    DeployError,
    load_program,
    load_stream,
    program,
    write_onnx,
    write_stablehlo,
    write_stream,
)
from vir_jax.inference import stream
from vir_jax.runs.model import model_functions
from vir_jax.weights import Card, PretrainedModel, load


@pytest.fixture(autouse=True)
def sizes_may_be_symbols():
    """The size of a batch that is free is no int, and the checks of types in tests take it for a mistake."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


HAS_ONNX = all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnxruntime"))


def pretrained(name="vir_pico2", channels=None, **options):
    """A small model whose weights all matter."""
    colours = channels or 3
    model = {"name": name, "image_size": [8, 12], "readout": "class_token", "layer_scale": None, **options}
    model["channels"] = channels
    functions = model_functions(model, 3)
    params = jax.jit(functions.init)(jax.random.key(0))
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(draw(x.shape), x.dtype), params)
    card = Card(
        model=model, num_classes=3, class_names=tuple("abc"), mean=(0.4,) * colours, std=(0.3,) * colours
    )
    return PretrainedModel(card, functions, params)


def pixels(*shape):
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vir_pico2", {}),
        ("vir_pico2", {"bidirectional": True}),
        ("vit_pico2", {"readout": "average", "channels": 1}),
    ],
)
def test_stablehlo_of_any_batch(tmp_path, name, options):
    model = pretrained(name, **options)
    assert write_stablehlo(tmp_path / "x", model) < 1e-5
    loaded = load_program(tmp_path / "x")
    for batch in (1, 5):
        images = pixels(batch, 8, 12, 3)
        np.testing.assert_allclose(loaded(images), model(images), rtol=1e-4, atol=1e-5)
    assert loaded.card["input"] == {"dtype": "uint8", "shape": ["b", 8, 12, 3]}
    assert loaded.card["model"]["class_names"] == ["a", "b", "c"]
    with pytest.raises(FileExistsError, match="holds a program"):
        write_stablehlo(tmp_path / "x", model)


def test_a_program_for_other_machines(tmp_path):
    model = pretrained()
    write_stablehlo(tmp_path, model, platforms=["cpu", "tpu"])
    assert load_program(tmp_path).exported.platforms == ("cpu", "tpu")


def test_a_program_that_differs_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "TOLERANCE", 0.0)
    with pytest.raises(DeployError, match="expected at most 0e"):
        program.check_same([1.0, 2.0], [1.0, 2.1], "the program")
    with pytest.raises(DeployError, match="nan"):
        program.check_same([np.nan, 2.0], [1.0, 2.0], "the program")


@pytest.mark.parametrize(
    "options", [{"stem": "conv"}, {"retention": "2d"}, {"readout": "average", "position": "sincos"}]
)
def test_the_streaming_step(tmp_path, options):
    """State in, state out, at another size than that of training."""
    model = pretrained(**options)
    assert write_stream(tmp_path, model, width=16, height=10) < 1e-5
    loaded = load_stream(tmp_path)
    images = pixels(2, 10, 16, 3)
    state = loaded.start(2)
    for top in range(0, 10, 2):
        state = loaded.step(state, images[:, top : top + 2])
    expected = stream(model.model, images, normalization=(model.card.mean, model.card.std))
    np.testing.assert_allclose(loaded.read(state), expected, rtol=1e-4, atol=1e-5)
    assert [tuple(leaf.shape) for leaf in state] == [
        tuple(2 if side == "b" else side for side in leaf["shape"]) for leaf in loaded.card["state"]
    ]


def test_what_has_no_state_is_no_stream(tmp_path):
    with pytest.raises(ValueError, match="cannot be streamed"):
        write_stream(tmp_path, pretrained("vit_pico2"))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(HAS_ONNX, reason="jax2onnx is there")
def test_onnx_is_an_extra(tmp_path):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vir-jax\[export\]'"):
        write_onnx(tmp_path, pretrained())


@pytest.mark.skipif(not HAS_ONNX, reason="needs jax2onnx and onnxruntime")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vir_pico2", "vit_pico2"])
def test_onnx(tmp_path, name):
    import onnxruntime

    model = pretrained(name)
    assert write_onnx(tmp_path, model) < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images = pixels(5, 8, 12, 3)
    (logits,) = session.run(None, {"images": images})
    np.testing.assert_allclose(logits, model(images), rtol=1e-4, atol=1e-4)


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "vir_jax.deploy", "vir_digits", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "relative RMS difference" in done.stdout
    images = pixels(2, 8, 8, 3)
    np.testing.assert_allclose(
        load_program(tmp_path / "x")(images), load("vir_digits")(images), rtol=1e-4, atol=1e-4
    )
    assert json.loads((tmp_path / "x" / "program.json").read_text())["model"]["score"]["top1"] > 0.9
    done = subprocess.run([*command, "--stream", "--format=onnx"], capture_output=True, text=True)
    assert "--stream is of --format=stablehlo" in done.stdout + done.stderr
