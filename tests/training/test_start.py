"""What is found out before the first step: wrong classes, other data, what cannot be opened."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import vir_jax.training.loop
from vir_jax.data import open_source
from vir_jax.evaluation import evaluate_workdir
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.config import default_config
from vir_jax.runs.load import load_run
from vir_jax.runs.metrics import read_metrics
from vir_jax.runs.state import TrainState
from vir_jax.training.loop import train


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """For one device Orbax saves in a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        on_one = functools.partial(make_mesh, devices=jax.devices()[:1])
        patch.setattr(vir_jax.training.loop, "make_mesh", on_one)
        yield


@pytest.fixture(scope="module")
def folder_config(make_digits_config):
    """20 steps on folders of images, enough to tell dark ones from bright ones."""

    def make(data_dir):
        config = make_digits_config()
        config.batch_size = config.eval_batch_size = 16
        config.epochs, config.optim.warmup_epochs, config.optim.cooldown_epochs = 10.0, 0.0, 0.0
        config.optim.lr, config.checkpoint_every = 1e-2, 100
        config.accumulation_steps, config.label_smoothing, config.ema_decay = 1, 0.0, 0.0
        config.model.drop_path_rate = config.mixing.mixup_alpha = config.mixing.cutmix_alpha = 0.0
        config.augment = default_config().augment
        config.data.dataset, config.data.data_dir = "folder", str(data_dir)
        config.data.train_split, config.data.eval_split = "training", "validation"
        return config

    return make


BRIGHTNESS = {"a": 20, "b": 230, "c": 120}


def write_images(folder, counts, *, seed=0):
    """So many images a class, as bright as the class says."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = BRIGHTNESS[name] + rng.integers(-15, 16, (8, 8, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")


@pytest.fixture
def data(tmp_path):
    write_images(tmp_path / "data" / "training", {"a": 16, "b": 16})
    return tmp_path / "data"


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr("vir_jax.training.plan.TrainingPlan.compile", lambda self: pytest.fail("compiled"))


def assert_untouched(workdir):
    """No more there than the lock; the folder may go to any run."""
    assert [path.name for path in workdir.iterdir()] == ["lock"]


@pytest.mark.parametrize("split", ["validation", "train", "test"])
def test_validation_is_scored_against_the_training_classes(tmp_path, data, folder_config, split):
    """Whatever the splits are called, and with a part of the classes."""
    write_images(data / split, {"b": 10}, seed=1)
    config = folder_config(data)
    config.data.eval_split = split
    metrics = train(config, tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-2]["train/top1"] == 1.0
    assert (metrics["top1"], metrics["count"]) == (1.0, 10)
    if split == "validation":
        assert evaluate_workdir(tmp_path / "run")["auto"].metrics == pytest.approx(metrics, rel=1e-4)
        assert load_run(tmp_path / "run").class_names == ("a", "b")


@pytest.mark.usefixtures("nothing_compiled")
def test_a_class_that_training_lacks_is_refused(tmp_path, data, folder_config):
    write_images(data / "validation", {"b": 2, "c": 2})
    with pytest.raises(ValueError, match=r"the evaluation data has classes .* does not know: 'c'\."):
        train(folder_config(data), tmp_path / "run")
    assert_untouched(tmp_path / "run")


@pytest.mark.usefixtures("nothing_compiled")
def test_one_class_is_nothing_to_learn(tmp_path, folder_config):
    for split in ("training", "validation"):
        write_images(tmp_path / "data" / split, {"a": 16})
    with pytest.raises(ValueError, match=r"the training data has 1 class\(es\) \('a'\): expected at least 2"):
        train(folder_config(tmp_path / "data"), tmp_path / "run")
    assert_untouched(tmp_path / "run")


class Renamed:
    """Digits under other class names, with labels moved along."""

    def __init__(self, split, class_names, *, num_classes=10, moved=0):
        self.source, self.moved = open_source("digits", split), moved
        self.class_names, self.num_classes, self.name = class_names, num_classes, self.source.name

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        example = self.source[index]
        return {**example, "label": (example["label"] + self.moved) % 10}


DIGITS = tuple("0123456789")


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"train": (DIGITS, {"num_classes": 11})},
            "the training data has num_classes = 11, but 10 class_names",
        ),
        ({"eval": (DIGITS[:9], {})}, "the evaluation data has num_classes = 10, but 9 class_names"),
        ({"train": (("0", *DIGITS[:9]), {})}, "several classes of one name: '0'"),
        ({"eval": (tuple(f"digit {i}" for i in range(10)), {})}, r"does not know: 'digit 0', .* and 5 more"),
    ],
)
def test_custom_sources_are_checked(tmp_path, digits_config, sources, message):
    given = {f"{use}_source": Renamed("train", names, **options) for use, (names, options) in sources.items()}
    with pytest.raises(ValueError, match=message):
        train(digits_config, tmp_path, **given)
    assert_untouched(tmp_path)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.train_split": "trainign"}, ValueError, "digits has no split 'trainign'"),
        ({"data.eval_split": "validation"}, ValueError, "digits has no split 'validation'"),
        ({"init_from": "runs/typo"}, FileNotFoundError, "no checkpoints in .*typo"),
    ],
)
def test_mistakes_claim_no_workdir(tmp_path, digits_config, changes, error, message):
    digits_config.update_from_flattened_dict(changes)
    with pytest.raises(error, match=message):
        train(digits_config, tmp_path)
    assert_untouched(tmp_path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory, folder_config):
    """A run on folders that is to go on, and its data."""
    folder = tmp_path_factory.mktemp("begun")
    write_images(folder / "data" / "training", {"a": 16, "b": 16})
    write_images(folder / "data" / "validation", {"a": 4, "b": 4}, seed=1)
    config = folder_config(folder / "data")
    config.epochs = 1.0
    train(config, folder / "run")
    return folder


@pytest.fixture
def copy(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "copy")


def test_a_checkpoint_says_what_it_was_trained_on(begun):
    with CheckpointReader(begun / "run") as checkpoints:
        _, metadata = checkpoints.restore_config(checkpoints.resolve("last"))
    assert metadata["class_names"] == ["a", "b"]
    assert metadata["training_data"]["examples"] == 32


def test_data_may_be_moved(copy, folder_config):
    (copy / "data").rename(copy / "moved")
    config = folder_config(copy / "moved")
    config.epochs = 2.0
    train(config, copy / "run")
    assert read_metrics(copy / "run")[-1]["step"] == 4


def rename_a_class(data):
    for split in ("training", "validation"):
        (data / split / "a").rename(data / split / "z")


def swap_the_classes(data):
    for split in ("training", "validation"):
        for old, new in (("a", "x"), ("b", "a"), ("x", "b")):
            (data / split / old).rename(data / split / new)


def add_a_class(data):
    write_images(data / "training", {"c": 1})


def rename_a_file(data):
    (data / "training" / "a" / "7.png").rename(data / "training" / "a" / "seven.png")


def move_a_file(data):
    (data / "training" / "a" / "7.png").rename(data / "training" / "b" / "70.png")


def remove_a_file(data):
    (data / "training" / "a" / "7.png").unlink()


def other_images(data):
    shutil.rmtree(data / "training")
    write_images(data / "training", {"a": 16, "b": 16}, seed=5)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_a_class, "gone: 'a'; new: 'z'"),
        (swap_the_classes, "other images: 32 of 32"),
        (add_a_class, "2 classes, now 3; gone: none; new: 'c'"),
        (rename_a_file, "under other names"),
        (move_a_file, "under other names"),
        (remove_a_file, "32 examples, now 31"),
        (other_images, "other images: 32 of 32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_run_goes_on_with_its_own_data_alone(copy, folder_config, change, message):
    change(copy / "data")
    files = {path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"holds a run that was trained on other data: .*{message}"):
        train(folder_config(copy / "data"), copy / "run")
    files[copy / "run" / "lock"] = (copy / "run" / "lock").read_bytes()
    assert {path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()} == files


@pytest.mark.usefixtures("nothing_compiled")
def test_classes_in_another_order_are_other_data(tmp_path, digits_config):
    """The head's units would be trained as other classes."""
    params = {"head": jnp.zeros(10)}
    state = TrainState(jnp.int32(1), params, optax.sgd(1.0).init(params), None)
    with Checkpoints(tmp_path) as checkpoints:
        metadata = {"class_names": list(DIGITS)}
        checkpoints.save(state, progress={}, config=digits_config, metadata=metadata)
    turned = Renamed("train", (*DIGITS[1:], "0"), moved=9)
    with pytest.raises(ValueError, match="class 0 was '0' and is '1': the same names in another order"):
        train(digits_config, tmp_path, train_source=turned)
