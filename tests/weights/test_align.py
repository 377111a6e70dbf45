"""From ViT to ViR."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vir_jax.models.pixels import normalize
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.config import default_config
from vir_jax.runs.load import load_run
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import TrainState
from vir_jax.weights import Card, PretrainedModel, WeightsError
from vir_jax.weights.align import align, block_inputs, class_token_last, mixed, relative_error, to_vir

PIXELS = np.random.RandomState(0).randint(0, 255, (8, 8, 8, 3), np.uint8)


def pretrained(name="vit_pico2", **options):
    model = {"name": name, "image_size": 8, "readout": "class_token", "layer_scale": None, **options}
    card = Card(model=model, num_classes=3, mean=(0.5,) * 3, std=(0.5,) * 3, score={"top1": 0.5})
    functions = model_functions(model, 3)
    return PretrainedModel(card, functions, jax.jit(functions.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def vit():
    """With larger weights than a fresh one, whose attention is all but an average."""
    made = pretrained()
    return PretrainedModel(made.card, made.functions, jax.tree.map(lambda x: 3 * x, made.params))


@pytest.mark.parametrize("retention", [None, "2d"])
def test_the_vir_reads_the_same_tokens(vit, retention):
    vir = to_vir(vit, retention=retention)
    assert vir.card.model["name"] == "vir_pico2"
    assert vir.card.score == {}
    images = normalize(jnp.asarray(PIXELS), (0.5,) * 3, (0.5,) * 3)
    theirs = vit.model.intermediates(images, ["tokens"])["tokens"]
    ours = vir.model.intermediates(images, ["tokens"])["tokens"]
    np.testing.assert_allclose(ours, jnp.roll(theirs, -1, axis=1), atol=1e-6)
    assert vir.model.stage.blocks.mixer.retention == (retention or "1d")
    assert jnp.all(jnp.isfinite(vir(PIXELS)))


def test_what_the_blocks_mix_is_what_the_model_mixes(vit):
    """Block by block: input + mixed is what the second half of the block reads."""
    images = normalize(jnp.asarray(PIXELS), (0.5,) * 3, (0.5,) * 3)
    tokens = block_inputs(vit, images)
    update = mixed(vit.functions, vit.params["stage"]["blocks"], tokens, vit.model.layout((8, 8)))
    outputs = vit.model.intermediates(images, [f"blocks.{i}.tokens" for i in range(4)])
    for i, expected in enumerate(outputs.values()):
        np.testing.assert_allclose(
            vit.model.block(i).add_mlp(tokens[i] + update[i]), expected, rtol=1e-4, atol=1e-4
        )


def test_alignment_brings_every_mixer_nearer_and_leaves_the_rest(vit):
    vir = to_vir(vit)
    aligned = align(vit, vir, iter([{"image": PIXELS}] * 30), steps=30, learning_rate=3e-3)
    images = normalize(jnp.asarray(PIXELS), (0.5,) * 3, (0.5,) * 3)
    tokens = block_inputs(vit, images)
    wanted = class_token_last(
        mixed(vit.functions, vit.params["stage"]["blocks"], tokens, vit.model.layout((8, 8)))
    )

    def errors(model):
        blocks, layout = model.params["stage"]["blocks"], model.model.layout((8, 8))
        actual = mixed(model.functions, blocks, class_token_last(tokens), layout)
        return np.array([relative_error(actual[i : i + 1], wanted[i : i + 1]) for i in range(4)])

    assert np.all(errors(aligned) < 0.7 * errors(vir))
    for part in ("stem", "readout"):
        jax.tree.map(np.testing.assert_array_equal, aligned.params[part], vir.params[part])
    for name in ("norm1", "norm2", "mlp"):
        before, after = (model.params["stage"]["blocks"][name] for model in (vir, aligned))
        jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("options", [{"name": "vir_pico2"}, {"mixer": "fnet"}])
def test_only_a_vit_becomes_a_vir(options):
    with pytest.raises(WeightsError, match="expected a vit_\\* with softmax attention"):
        to_vir(pretrained(**options))


def test_the_command_makes_a_run_to_start_from(tmp_path):
    config = default_config()
    config.model.name, config.model.image_size, config.batch_size = "vit_pico4", (8, 8), 32
    config.data.dataset, config.data.eval_split, config.augment.crop = "digits", "test", "none"
    params = jax.jit(model_functions(config.model, 10).init)(jax.random.key(0))
    state = TrainState(jnp.int32(1), params, optax.sgd(1.0).init(params), None)
    with Checkpoints(tmp_path / "vit") as checkpoints:
        metadata = {"class_names": [str(digit) for digit in range(10)]}
        checkpoints.save(state, progress={}, config=config, metadata=metadata)
    command = [sys.executable, "-m", "vir_jax.weights", "align", str(tmp_path / "vit"), str(tmp_path / "vir")]
    done = subprocess.run([*command, "--checkpoint=last", "--steps=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = load_run(tmp_path / "vir", "last")
    assert (run.config.model.name, run.config.model.mixer) == ("vir_pico4", "retention")
    kernels = (tree["stage"]["blocks"]["mixer"]["qkv"]["kernel"] for tree in (run.params, params))
    assert not np.array_equal(*kernels)
    np.testing.assert_array_equal(
        run.params["readout"]["head"]["kernel"], params["readout"]["head"]["kernel"]
    )
