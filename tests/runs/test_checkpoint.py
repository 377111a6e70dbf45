"""Checkpoints: what is kept, what is restored on any mesh, what is damaged, and reading beside a run."""

import contextlib
import dataclasses
import math
import re
import shutil
import threading

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import vir_jax.runs.checkpoint_reader
from tests.runs.helpers import make_state, save
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.checkpoint_reader import CheckpointReader, NotEvaluatedError, RemovedCheckpointError
from vir_jax.runs.config import default_config
from vir_jax.runs.manifest import MANIFEST, DamagedCheckpointError, verify


def shapes(state, mesh, spec):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())
        ),
        state,
    )


def on_one_device(state):
    return shapes(state, make_mesh(devices=jax.devices()[:1]), PartitionSpec())


def test_newest_and_best_are_kept(tmp_path):
    top1 = {2: 0.5, 4: 0.9, 8: 0.7}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in range(1, 10):
            save(checkpoints, make_state(step))
            if step in top1:
                checkpoints.record_evaluation(step, {"top1": top1[step]}, score=top1[step])
    with CheckpointReader(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == checkpoints.resolve("last") == 9
        assert checkpoints.resolve("best") == 4
        assert checkpoints.resolve("8") == 8
        assert checkpoints.metrics(4) == {"top1": 0.9}
        assert checkpoints.metrics(9) is None
        with pytest.raises(ValueError, match=r"no checkpoint '3' .* steps there: \[4, 8, 9\]"):
            checkpoints.resolve("3")
        with pytest.raises(ValueError, match="expected 'last', 'best' or the number of a step"):
            checkpoints.resolve("newest")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ((2, 2, 2), (1, 1, 1)),
        ((1, 1, 1), (2, 2, 2)),
        ((1, 8, 1), (2, 1, 4)),
    ],
)
def test_restored_on_another_mesh(tmp_path, written, read):
    def place(sizes):
        return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])

    state = make_state(3)
    sharded = jax.tree.map(
        lambda x, s: jax.device_put(x, s.sharding),
        state,
        shapes(state, place(written), PartitionSpec("fsdp")),
    )
    target = shapes(state, place(read), PartitionSpec("tensor"))
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, sharded)
    with Checkpoints(tmp_path) as checkpoints:
        restored, progress = checkpoints.restore(target, 3)
    assert progress == {"data": "3"}
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, state))
    chex.assert_trees_all_equal_structs(restored, state)
    assert restored.params["blocks"][0]["kernel"].sharding == target.params["blocks"][0]["kernel"].sharding


def test_weights_alone(tmp_path):
    state = make_state(1)
    state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 1, state.params))
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state)
    with CheckpointReader(tmp_path) as checkpoints:
        assert checkpoints.has_ema(1)
        config, metadata = checkpoints.restore_config(1)
        for weights, expected in (("raw", state.params), ("ema", state.ema)):
            params = checkpoints.restore_params(1, weights=weights)
            np.testing.assert_array_equal(params["blocks"]["0"]["kernel"], expected["blocks"][0]["kernel"])
        with pytest.raises(ValueError, match="'average': expected one of"):
            checkpoints.restore_params(1, weights="average")
    assert metadata == {"a": 1}
    assert config.model.name == default_config().model.name


def test_a_checkpoint_is_read_without_the_kernel_that_it_was_trained_with(tmp_path):
    config = default_config()
    config.model.implementation = "mosaic_gpu"
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), progress={}, config=config, metadata={})
        checkpoints.finish()
        assert checkpoints.restore_config(1)[0].model.implementation is None


def test_no_average_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, make_state(1, ema=False))
    with CheckpointReader(tmp_path) as checkpoints:
        assert not checkpoints.has_ema(1)
        with pytest.raises(ValueError, match="holds no EMA: the run had ema_decay = 0"):
            checkpoints.restore_params(1, weights="ema")


def test_no_checkpoints_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoints in"):
        CheckpointReader(tmp_path / "absent")


# --- A run that goes on while its checkpoints are read ---


def remove(workdir, step):
    """As a run does."""
    folder = workdir / "checkpoints"
    (folder / str(step)).rename(folder / f"{step}.removed")
    shutil.rmtree(folder / f"{step}.removed")


@pytest.fixture
def removed_when_verified(monkeypatch):
    """A function that makes a checkpoint vanish as soon as its files have been found intact."""
    verify_files = verify

    def removing(workdir, *steps):
        def verify_and_remove(folder, *, step, items=None):
            verify_files(folder, step=step, items=items)
            if step in steps and items == ("params",):
                remove(workdir, step)

        monkeypatch.setattr(vir_jax.runs.checkpoint_reader, "verify", verify_and_remove)

    return removing


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_reader_takes_the_next_when_its_checkpoint_is_removed(three_steps, removed_when_verified):
    with CheckpointReader(three_steps) as checkpoints:

        def read(step):
            checkpoints.restore_config(step)
            return step, checkpoints.restore_params(step, weights="raw")

        removed_when_verified(three_steps, 1, 3)
        assert checkpoints.read("last", read)[0] == 2
        with pytest.raises(
            RemovedCheckpointError, match=r"step 1 .* was removed by the run meanwhile.*\[2\]"
        ):
            checkpoints.read("1", read)
        assert checkpoints.read("best", read)[0] == 2


@pytest.mark.parametrize("method", ["has_ema", "restore_config", "restore_params"])
def test_every_method_tells_removed_from_damaged(three_steps, method):
    options = {"weights": "raw"} if method == "restore_params" else {}
    with CheckpointReader(three_steps) as checkpoints:
        remove(three_steps, 3)
        with pytest.raises(RemovedCheckpointError, match=r"step 3 .* was removed by the run meanwhile"):
            getattr(checkpoints, method)(3, **options)
        assert checkpoints.metrics(3) is None
        (three_steps / "checkpoints" / "2" / MANIFEST).unlink()
        with pytest.raises(DamagedCheckpointError):
            checkpoints.restore_params(2, weights="raw")


def test_a_checkpoint_that_is_always_removed_ends_in_an_error(three_steps, monkeypatch):
    with CheckpointReader(three_steps) as checkpoints:
        monkeypatch.setattr(checkpoints, "_resolve", lambda which: 99)
        with pytest.raises(RemovedCheckpointError, match="step 99"):
            checkpoints.read("last", checkpoints.has_ema)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax drops what else it had to read.
def test_reading_beside_a_run(tmp_path):
    """The run keeps one checkpoint and replaces it as fast as it can; no reader takes that for damage."""
    steps = 60
    with Checkpoints(tmp_path / "made", keep=steps) as made:
        for step in range(1, steps + 1):
            save(made, make_state(step))
    source, folder = tmp_path / "made" / "checkpoints", tmp_path / "run" / "checkpoints"
    shutil.copytree(source / "1", folder / "1")
    read, done = [], threading.Event()

    def run():
        for step in range(2, steps + 1):
            shutil.copytree(source / str(step), folder / "next.orbax-checkpoint-tmp")
            (folder / "next.orbax-checkpoint-tmp").rename(folder / str(step))
            remove(tmp_path / "run", step - 1)
        done.set()

    writer = threading.Thread(target=run)
    with CheckpointReader(tmp_path / "run") as checkpoints:

        def weights(step):
            checkpoints.restore_config(step)
            kind = "ema" if checkpoints.has_ema(step) else "raw"
            checkpoints.restore_params(step, weights=kind)
            return step

        writer.start()
        while not done.is_set():
            with contextlib.suppress(RemovedCheckpointError):  # Ten times in a row: this run is in a hurry.
                read.append(checkpoints.read("last", weights))
        writer.join()
        read.append(checkpoints.read("last", weights))
    assert read == sorted(read)
    assert read[-1] == steps


def test_the_best_has_the_highest_score_and_nan_is_none(tmp_path):
    """A task whose loss is its figure scores with its negative."""
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, loss in ((1, math.nan), (2, 0.5), (3, 0.25), (4, 0.75)):
            save(checkpoints, make_state(step))
            checkpoints.record_evaluation(step, {"loss": loss}, score=-loss)
            if step == 1:
                with pytest.raises(NotEvaluatedError, match="none was evaluated"):
                    checkpoints.resolve("best")
        assert checkpoints.resolve("best") == 3


def test_only_evaluations_of_the_same_data_are_compared(tmp_path):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, top1, split in ((1, 0.9, "easy"), (2, 0.3, "hard"), (3, 0.2, "hard")):
            save(checkpoints, make_state(step))
            checkpoints.record_evaluation(step, {"top1": top1}, score=top1, on={"split": split})
        assert checkpoints.resolve("best") == 2
        assert checkpoints.metrics(1) == checkpoints.metrics(1, on={"split": "easy"}) == {"top1": 0.9}
        assert checkpoints.metrics(1, on={"split": "hard"}) is None


# --- Faults ---


def truncate(folder):
    path = max((folder / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(folder):
    path = max((folder / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_an_item(folder):
    shutil.rmtree(folder / "ema")


def remove_the_manifest(folder):
    (folder / MANIFEST).unlink()


def garble_the_manifest(folder):
    (folder / MANIFEST).write_bytes(b"\xff{")


DAMAGES = {
    truncate: r"params/.* has [\d,]+ bytes, not the [\d,]+ that were written",
    flip_a_byte: r"params/.* holds other bytes than were written",
    remove_an_item: r"ema/.* is missing",
    remove_the_manifest: "manifest.json is missing",
    garble_the_manifest: "manifest.json cannot be read",
}


@pytest.fixture
def three_steps(tmp_path):
    """Checkpoints of steps 1 to 3, of which the first is the best."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, make_state(step))
            checkpoints.record_evaluation(step, {"top1": 1 / step}, score=1 / step)
    return tmp_path


def read_weights(workdir, step):
    """As evaluation does."""
    with CheckpointReader(workdir) as checkpoints:
        for weights in ("raw", "ema") if checkpoints.has_ema(step) else ("raw",):
            checkpoints.restore_params(step, weights=weights)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(three_steps, damage, caplog):
    damage(three_steps / "checkpoints" / "3")
    with pytest.raises(DamagedCheckpointError, match=rf"checkpoints/3 is damaged: {DAMAGES[damage]}"):
        read_weights(three_steps, 3)
    with Checkpoints(three_steps, keep=2) as checkpoints:
        assert checkpoints.newest_intact() == 2
        assert re.search(rf"checkpoints/3 is damaged: {DAMAGES[damage]}", caplog.text)
        assert "kept as 3.damaged1; falling back to step 2" in caplog.text
        assert checkpoints.steps() == [1, 2]
        state = make_state(3)
        save(checkpoints, state)  # The step comes round again.
        assert checkpoints.newest_intact() == 3
        restored, _ = checkpoints.restore(on_one_device(state), 3)
    chex.assert_trees_all_equal(restored.params, state.params)


def test_damage_does_not_move_the_best(three_steps):
    flip_a_byte(three_steps / "checkpoints" / "1")
    with Checkpoints(three_steps, keep=2) as checkpoints:
        assert checkpoints.newest_intact() == 3
        assert checkpoints.resolve("best") == 1
        with pytest.raises(
            DamagedCheckpointError, match=r"checkpoints/1 .* other checkpoints there: \[2, 3\]"
        ):
            checkpoints.restore_params(1, weights="raw")


def test_a_damaged_evaluation_counts_as_none(three_steps, caplog):
    path = three_steps / "checkpoints" / "2" / "evaluation.json"
    path.write_text(path.read_text().replace("0.5", "7.5", 1))
    with CheckpointReader(three_steps) as checkpoints:
        assert checkpoints.metrics(2) is None
        assert checkpoints.resolve("best") == 1
    assert "evaluation.json is damaged" in caplog.text


def test_no_checkpoint_left_is_an_error(three_steps):
    for step in (1, 2, 3):
        truncate(three_steps / "checkpoints" / str(step))
    with Checkpoints(three_steps) as checkpoints:
        for _ in range(2):  # Nothing is put aside: the next start says the same.
            with pytest.raises(
                DamagedCheckpointError, match=r"(?s)no checkpoint .*/3 is damaged.*/1 is damaged"
            ):
                checkpoints.newest_intact()


def test_any_flipped_bit_is_found_and_notes_do_not_matter(three_steps):
    folder = three_steps / "checkpoints" / "3"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        if path.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            path.unlink()
            continue
        if path.name == "evaluation.json" or not data:
            continue
        for position in {0, len(data) // 2, len(data) - 1}:
            flipped = bytearray(data)
            flipped[position] ^= 1 << 3
            path.write_bytes(flipped)
            with pytest.raises(DamagedCheckpointError):
                verify(folder, step=3)
        path.write_bytes(data)
    state = make_state(3)
    with Checkpoints(three_steps) as checkpoints:
        assert checkpoints.newest_intact() == 3
        restored, _ = checkpoints.restore(on_one_device(state), 3)
        checkpoints.restore_params(3, weights="raw")
    chex.assert_trees_all_equal(restored.params, state.params)


def test_a_checkpoint_under_another_name_is_not_taken(three_steps):
    (three_steps / "checkpoints" / "3").rename(three_steps / "checkpoints" / "9")
    with Checkpoints(three_steps, keep=2) as checkpoints:
        assert checkpoints.newest_intact() == 2
    assert (three_steps / "checkpoints" / "9.damaged1").is_dir()


def test_what_a_kill_leaves_behind_is_cleared(three_steps):
    folder = three_steps / "checkpoints"
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")  # killed while it was written
    (folder / "2").rename(folder / "2.removed")  # killed while it was removed
    with Checkpoints(three_steps, keep=2) as checkpoints:
        assert checkpoints.newest_intact() == 3
        save(checkpoints, make_state(4))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3", "4"]
