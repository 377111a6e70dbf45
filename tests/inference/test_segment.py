"""Masks of files: those of the model, whole and streamed; what cannot be read is told; other runs are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from tests.inference.test_predict import write_checkpoint
from tests.test_command_line import run
from vir_jax.data import eval_transform
from vir_jax.data.masks import decode_mask
from vir_jax.inference.segment import segment_files
from vir_jax.label_maps import palette
from vir_jax.models.pixels import normalize
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.config import default_config
from vir_jax.runs.load import load_run
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import TrainState

NAMES = [f"class {i}" for i in range(4)]


def make_workdir(folder, readout):
    """A checkpoint of random weights that all matter."""
    config = default_config()
    config.task = "segmentation"
    config.model.name, config.model.image_size, config.model.readout = "vir_pico4", (8, 8), readout
    config.model.position = "sincos"
    shapes = jax.eval_shape(model_functions(config.model, 4).init, jax.random.key(0))
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw(leaf.shape), leaf.dtype), shapes)
    if readout == "dense_linear":  # Of whose few tokens all would be of one class.
        params["stem"]["embedding"]["conv"]["kernel"] *= 30
        params["readout"]["norm"]["bias"] *= 0
        params["readout"]["head"]["bias"] *= 0
    state = TrainState(step=jnp.int32(1), params=params, opt_state=optax.sgd(1.0).init(params), ema=None)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state, progress={}, config=config, metadata={"class_names": NAMES})
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("run"), "dense_patch")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(1).integers(0, 256, (14, 9, 3), np.uint8)
    np.save(folder / "rows.npy", pixels)
    Image.fromarray(pixels).save(folder / "photo.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder, pixels


def labels_of(workdir, pixels):
    loaded = load_run(workdir, "last")
    images = normalize(jnp.asarray(pixels[None]), (0.5,) * 3, (0.5,) * 3)
    return np.asarray(jnp.argmax(jax.jit(loaded.functions.apply)(loaded.params, images), axis=-1))[0]


@pytest.mark.parametrize("streamed", [False, True])
def test_masks_are_those_of_the_model(workdir, files, tmp_path, streamed):
    folder, pixels = files
    # At its own size the model sees 12 x 8 pixels of the middle; else the central crop, resized.
    seen = pixels[1:13, :8] if streamed else eval_transform(pixels, 8, 1.0)
    expected = labels_of(workdir, seen)
    results = {
        result.file: result
        for result in segment_files(workdir, folder, tmp_path / "masks", top=2, streamed=streamed)
    }
    assert results[str(folder / "broken.png")].error is not None
    for name in ("rows.npy", "photo.png")[: 1 + (not streamed)]:
        result, stem = results[str(folder / name)], name[:-4]
        assert result.error is None
        found = decode_mask((tmp_path / "masks" / f"{stem}.png").read_bytes())
        np.testing.assert_array_equal(found, expected)
        overlay = np.asarray(Image.open(result.overlay)).astype(int)
        np.testing.assert_array_equal(overlay, (seen.astype(int) + palette()[expected]) // 2)
        shares = [(np.mean(expected == i), name) for i, name in enumerate(NAMES)]
        assert dict(result.classes) == pytest.approx({name: s for s, name in sorted(shares)[-2:]})
        assert str(result).startswith(f"{folder / name}: {result.mask}  {result.classes[0][0]} ")
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [
        "photo.overlay.png", "photo.png", "rows.overlay.png", "rows.png",
    ]  # fmt: skip


def test_streamed_masks_may_be_interpolated(files, tmp_path):
    """The rows that wait for a row of patches below are written with it, and at the end."""
    (folder, pixels), workdir = files, make_workdir(tmp_path / "run", "dense_linear")
    (result,) = segment_files(workdir, folder / "rows.npy", tmp_path / "masks", streamed=True)
    assert result.error is None
    found, expected = (
        decode_mask((tmp_path / "masks" / "rows.png").read_bytes()),
        labels_of(workdir, pixels[1:13, :8]),
    )
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(found, expected)


def test_no_mask_is_overwritten_by_another(workdir, files, tmp_path):
    folder, _ = files
    first, second = segment_files(workdir, [folder / "photo.png"] * 2, tmp_path)
    assert first.error is None
    assert "another image of this call is called photo, too" in second.error


def test_a_classifier_writes_no_masks(files, tmp_path):
    write_checkpoint(tmp_path / "run")
    with pytest.raises(
        ValueError, match="task is Classification, which gives no class to each pixel; expected segm"
    ):
        next(segment_files(tmp_path / "run", files[0], tmp_path / "masks"))
    assert not (tmp_path / "masks").exists()


def test_the_command(workdir, files, tmp_path):
    folder, _ = files
    given = (f"--workdir={workdir}", f"--segment={tmp_path}", "--json", "--stream")
    result = run("predict.py", *given, folder / "rows.npy", folder / "broken.png")
    assert result.returncode == 1, result.stderr
    good, bad = (json.loads(line) for line in result.stdout.splitlines())
    assert good["mask"] == str(tmp_path / "rows.png")
    assert sum(found["share"] for found in good["classes"]) == pytest.approx(1)
    assert set(bad) == {"file", "error"}
