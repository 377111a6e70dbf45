import collections
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vir_jax.data import eval_loader, open_source
from vir_jax.evaluation import ModesDisagreeError, evaluate_workdir, evaluation_mesh, format_results
from vir_jax.ops import MODES
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.config import default_config
from vir_jax.runs.model import ModelFunctions
from vir_jax.tasks.classification import Classification
from vir_jax.training import evaluate
from vir_jax.training.evaluate import TIMED_BATCHES, Evaluator, evaluation_sums
from vir_jax.training.loop import train


class PixelsAsTheyAre(Classification):
    """With pixels as they are."""

    def inputs(self, batch):
        return batch["image"]


TASK = PixelsAsTheyAre(default_config(), "0123456789")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = default_config()
    config.epochs, config.optim.warmup_epochs, config.optim.cooldown_epochs = 1.0, 0.0, 0.0
    config.batch_size, config.eval_batch_size, config.ema_decay = 128, 128, 0.5
    config.model.name, config.model.image_size, config.model.dtype = "vir_pico2", (8, 8), "float32"
    config.model.layer_scale = 1e-5
    config.data.dataset, config.data.eval_split, config.data.threads = "digits", "test", 2
    config.optim.name, config.optim.lr = "adamw", 1e-3
    config.eval_every = 8
    folder = tmp_path_factory.mktemp("run")
    train(config, folder)
    return folder


@pytest.mark.parametrize(("batch_size", "length"), [(8, 355), (64, 355), (512, 355), (8, 8)])
def test_every_example_counts_once(batch_size, length):
    """A model that knows the label from the pixels is right on all examples, and on no padding."""
    source = open_source("digits", "test")

    class Numbered:
        num_classes, class_names = 10, source.class_names

        def __len__(self):
            return length

        def __getitem__(self, index):
            label = index % 10
            wrong = index % 5 == 0
            return {"image": np.full((8, 8, 3), (label + wrong) % 10, np.uint8), "label": label}

        def name(self, index):
            return str(index)

    def apply(params, images, *, mode):
        return params * jax.nn.one_hot(images[:, 0, 0, 0], 10)

    batches = eval_loader(Numbered(), batch_size=batch_size, image_size=8, crop_fraction=1.0, num_threads=1)
    modes = ["parallel", "chunkwise"]
    evaluator = Evaluator(TASK, apply, make_mesh(), batch_size=batch_size, modes=modes)
    results = evaluator(jnp.float32(30.0), batches)
    metrics = results["parallel"].metrics
    wrong = len(range(0, length, 5))
    assert metrics["count"] == length
    assert metrics["top1"] == pytest.approx((length - wrong) / length, abs=1e-12)
    assert metrics["loss"] == pytest.approx(30.0 * wrong / length, rel=1e-6)
    assert results["chunkwise"].difference == 0.0


@pytest.mark.parametrize("padding", [0.0, np.nan])
def test_padding_is_not_counted(padding):
    logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [padding, padding]])
    batch = {"label": jnp.array([0, 0, 0]), "mask": jnp.array([True, True, False])}
    sums = evaluation_sums(TASK, logits, logits + 1.0, batch)
    expected = {
        "loss": np.log(1 + np.exp(-2.0)) + np.log(1 + np.exp(1.0)),
        "top1": 1.0,
        "top5": 2.0,
        "count": 2.0,
        "squared_difference": 4.0,
        "squared_reference": 9 + 1 + 1 + 4.0,
    }
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)


@pytest.fixture
def counting():
    """A model that counts in which mode it is computed, and the batches of one pixel that it is given."""
    computed = collections.Counter()

    def apply(params, images, *, mode):
        jax.debug.callback(lambda pixel: computed.update([mode]), images[0, 0, 0, 0])
        return params * jax.nn.one_hot(images[:, 0, 0, 0], 10)

    batch = {
        "image": np.zeros((8, 1, 1, 3), np.uint8),
        "label": np.zeros(8, np.int32),
        "mask": np.ones(8, bool),
    }
    mesh = make_mesh(devices=jax.devices()[:1])
    evaluator = Evaluator(TASK, apply, mesh, batch_size=8, modes=["parallel", "recurrent"])
    return evaluator, batch, computed


def test_every_batch_is_computed_once_and_most_are_not_waited_for(counting, monkeypatch):
    evaluator, batch, computed = counting
    wait, waits = jax.block_until_ready, []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waits.append(x) or wait(x))
    compile_, compiled = jax.stages.Lowered.compile, []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: compiled.append(self) or compile_(self))
    events = []

    def stream(count):
        for number in range(count):
            events.append(f"loaded {number}")
            yield batch

    add = evaluate._add
    monkeypatch.setattr(evaluate, "_add", lambda *args: events.append("read") or add(*args))
    count = TIMED_BATCHES + 12
    results = evaluator(jnp.float32(1.0), stream(count))
    jax.effects_barrier()
    assert computed == {"parallel": count, "recurrent": count}
    assert results["parallel"].metrics["count"] == 8 * count
    assert len(waits) == 3 * TIMED_BATCHES  # For the batch, and for each mode.
    assert events[-3:] == [f"loaded {count - 1}", "read", "read"]  # That of the batch before, and its own.
    assert len(compiled) == 2
    evaluator(jnp.float32(2.0), stream(1))
    assert len(compiled) == 2


def test_speed_is_that_of_the_forward_pass(monkeypatch):
    """Neither the first execution, nor compiling and loading count."""

    def slow(images):
        time.sleep(0.02)
        return images[:, 0, 0, 0].astype(np.float32)

    def apply(params, images, *, mode):
        shape = jax.ShapeDtypeStruct((8,), jnp.float32)
        return jax.pure_callback(slow, shape, images)[:, None] * jnp.ones((8, 10))

    def stream():
        for _ in range(4):
            time.sleep(0.1)
            yield {
                "image": np.zeros((8, 1, 1, 3), np.uint8),
                "label": np.zeros(8, np.int32),
                "mask": np.ones(8, bool),
            }

    mesh = make_mesh(devices=jax.devices()[:1])
    results = Evaluator(TASK, apply, mesh, batch_size=8, modes=["parallel"])(jnp.float32(1.0), stream())
    assert 8 / 0.1 < results["parallel"].images_per_second <= 8 / 0.02


def test_an_evaluation_that_ends_early_closes_its_loader(counting):
    evaluator, batch, _ = counting
    closed = []

    def stream():
        try:
            while True:
                yield batch
        finally:
            closed.append(True)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:  # Whose traceback keeps what it passed through alive.
        evaluator(jnp.float32(1.0), stream(), check=stop)
    assert closed
    del caught


def test_the_mesh_of_the_run_is_used_where_it_fits(workdir, caplog):
    config = default_config()
    config.mesh.fsdp = 4
    assert dict(evaluation_mesh(config.mesh).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    config.mesh.data, config.mesh.fsdp = 1, 256
    with caplog.at_level("INFO"):
        assert dict(evaluation_mesh(config.mesh).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert "does not fit 8 devices" in caplog.text


def test_all_modes_agree_on_a_trained_model(workdir):
    results = evaluate_workdir(workdir, mode="all")
    assert tuple(results) == MODES
    assert len({result.metrics["top1"] for result in results.values()}) == 1
    assert max(result.difference for result in results.values()) < 1e-5
    table = format_results(results).splitlines()
    assert len(table) == 1 + len(MODES)
    assert "355" in table[1]


def test_modes_that_disagree_fail(workdir, monkeypatch):
    apply = ModelFunctions.apply

    def slightly_wrong(self, params, images, key=None, *, mode=None):
        return apply(self, params, images, key, mode=mode) * (1.01 if mode == "recurrent" else 1.0)

    monkeypatch.setattr(ModelFunctions, "apply", slightly_wrong)
    with pytest.raises(ModesDisagreeError, match=r"(?s)parallel.*recurrent.*chunkwise"):
        evaluate_workdir(workdir, mode="all")


def test_weights_checkpoints_and_sizes(workdir):
    raw = evaluate_workdir(workdir, weights="raw", mode="parallel")["parallel"].metrics
    ema = evaluate_workdir(workdir, weights="ema", mode="parallel")["parallel"].metrics
    assert evaluate_workdir(workdir)["auto"].metrics == pytest.approx(ema, rel=1e-4)
    assert raw["loss"] != ema["loss"]
    best = evaluate_workdir(workdir, checkpoint="best")["auto"].metrics
    first = evaluate_workdir(workdir, checkpoint="8")["auto"].metrics
    assert best["top1"] >= first["top1"]
    larger = evaluate_workdir(workdir, image_size=(12, 16), batch_size=64, mode="all")
    assert larger["parallel"].metrics["count"] == 355


DIGITS = tuple("0123456789")


class Digits:
    """Test images under class names of one's own; label i stands for the digit `order[i]`, others are left out."""

    def __init__(self, class_names, order):
        self.class_names, self.num_classes = tuple(class_names), len(order)
        self.source, self.order = open_source("digits", "test"), list(order)
        self.numbers = [i for i in range(355) if self.source[i]["label"] in self.order]
        self.name = self.source.name

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        example = self.source[self.numbers[index]]
        return {**example, "label": self.order.index(example["label"])}


def test_labels_are_compared_by_name(workdir):
    expected = evaluate_workdir(workdir)["auto"].metrics
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    assert evaluate_workdir(workdir, source=Digits([DIGITS[i] for i in order], order))[
        "auto"
    ].metrics == pytest.approx(expected, rel=1e-4)
    threes_and_ones = evaluate_workdir(workdir, source=Digits("31", [3, 1]))["auto"].metrics
    same_images = Digits(DIGITS, range(10))
    same_images.numbers = Digits("31", [3, 1]).numbers
    assert threes_and_ones == pytest.approx(
        evaluate_workdir(workdir, source=same_images)["auto"].metrics, rel=1e-4
    )
    assert 0 < threes_and_ones["count"] < 355
    with pytest.raises(
        ValueError, match="the evaluation data has classes that the model does not know: 'three'"
    ):
        evaluate_workdir(workdir, source=Digits(["1", "three"], [1, 3]))


def test_errors(workdir, tmp_path):
    with pytest.raises(ValueError, match="mode 'serial': vir_pico2 knows 'auto', 'all'"):
        evaluate_workdir(workdir, mode="serial")
    for size, reason in ((0, "image_size=0; expected"), (9, "9 x 9 pixels"), ((8, -8), "-8"), (True, "True")):
        with pytest.raises(ValueError, match=rf"cannot evaluate at image_size=.*{reason}"):
            evaluate_workdir(workdir, image_size=size)
    with pytest.raises(ValueError, match="no checkpoint '1'"):
        evaluate_workdir(workdir, checkpoint="1")
    with pytest.raises(ValueError, match="data_dir is empty"):
        evaluate_workdir(workdir, data_dir="")  # Not the run's own.
    with pytest.raises(FileNotFoundError, match="no checkpoints in"):
        evaluate_workdir(tmp_path)
