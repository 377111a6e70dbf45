import json

import jax.numpy as jnp
import numpy as np
import pytest

from vir_jax.data import open_source
from vir_jax.data.classes import select_classes
from vir_jax.evaluation import evaluate_workdir, format_results
from vir_jax.runs.config import default_config
from vir_jax.runs.evaluation_sets import EvaluationSet, default_set, named_sets
from vir_jax.runs.load import load_run
from vir_jax.runs.metrics import read_metrics
from vir_jax.runs.migrations import migrate
from vir_jax.runs.validate import validate
from vir_jax.tasks.classification import NEVER, Classification
from vir_jax.training.loop import train

EVEN = ("0", "2", "4", "6", "8")
SETS = ({"name": "even", "classes": EVEN}, {"name": "seen", "split": "train"})


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_digits_config, two_devices_throughout):
    config = make_digits_config()
    config.evaluations = SETS
    folder = tmp_path_factory.mktemp("run")
    return config, folder, train(config, folder)


def test_sets_are_evaluated_and_named(run):
    _, folder, metrics = run
    counts = {name: metrics[name] for name in metrics if name.endswith("count")}
    digits = open_source("digits", "test")
    even = sum(label % 2 == 0 for label in digits.labels)
    assert counts == {"count": 355, "even/count": even, "seen/count": 1442}
    # Choosing among five is easier than among ten.
    assert metrics["even/top1"] > metrics["top1"]
    assert metrics["even/top5"] == 1.0
    written = next(line for line in reversed(read_metrics(folder)) if "eval/top1" in line)
    assert written["eval/even/top1"] == metrics["even/top1"]
    assert load_run(folder).metrics == metrics


def test_a_finished_run_has_its_sets_on_record(run, monkeypatch):
    config, folder, metrics = run
    monkeypatch.setattr("vir_jax.training.loop.Evaluator.__call__", None)
    assert train(config, folder) == metrics


def test_a_finished_run_is_evaluated_on_a_set_that_is_new(run):
    config, folder, metrics = run
    more = config.copy_and_resolve_references()
    more.evaluations = (*SETS, {"name": "odd", "classes": ("1", "3")})
    found = train(more, folder)
    assert found.keys() - metrics.keys() == {f"odd/{name}" for name in ("top1", "top5", "loss", "count")}
    assert train(config, folder) == pytest.approx(metrics, rel=1e-6)  # For the tests that follow.


def test_eval_gives_each_set(run):
    _, folder, metrics = run
    results = evaluate_workdir(folder, evaluations=None)
    assert list(results) == ["auto", "even/auto", "seen/auto"]
    for name, result in results.items():
        prefix = name.removesuffix("auto")
        for metric, value in result.metrics.items():
            assert value == pytest.approx(metrics[prefix + metric], rel=1e-5), (name, metric)
    assert [line.split()[0] for line in format_results(results).splitlines()] == [
        "set",
        "default",
        "even",
        "seen",
    ]
    assert evaluate_workdir(folder).keys() == {"auto"}
    assert evaluate_workdir(folder, evaluations="even").keys() == {"even/auto"}
    assert evaluate_workdir(folder, evaluations=None, split="train").keys() == {"auto"}
    with pytest.raises(
        ValueError, match=r"no evaluation set 'evn'; expected 'all' or one of \['default', 'even'"
    ):
        evaluate_workdir(folder, evaluations="evn")
    with pytest.raises(ValueError, match="name one of both"):
        evaluate_workdir(folder, evaluations="even", split="train")


def test_the_best_does_not_depend_on_further_sets(run):
    _, folder, _ = run
    record = json.loads(next(folder.glob("checkpoints/*/evaluation.json")).read_text())
    assert [entry["name"] for entry in record["on"]["evaluations"]] == ["even", "seen"]
    assert record["score"] == record["metrics"]["top1"]


def test_the_model_chooses_among_the_classes_alone():
    task = Classification(default_config(), ("cat", "dog", "owl")).among(("cat", "owl"))
    outputs = jnp.array([[0.0, 5.0, 1.0], [2.0, 0.0, 1.0]])
    batch = {"label": jnp.array([2, 2]), "mask": jnp.ones(2, bool)}
    values = task.evaluate(outputs, batch)
    np.testing.assert_array_equal(values["top1"], [True, False])
    expected = np.log1p(np.exp([-1.0, 1.0]))
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(task.probabilities(outputs)[:, 2], np.exp(-expected), rtol=1e-6)
    assert float(task.scores(outputs)[0, 1]) == NEVER


def test_binary_cross_entropy_leaves_them_out_as_well():
    config = default_config()
    config.bce_loss = True
    task = Classification(config, ("cat", "dog", "owl")).among(("cat", "owl"))
    outputs = jnp.array([[0.0, 5.0, 1.0]])
    batch = {"label": jnp.array([2]), "mask": jnp.ones(1, bool)}
    expected = np.log(2) + np.log1p(np.exp(-1.0))  # Of "no cat" and "an owl"; that it is no dog is known.
    np.testing.assert_allclose(task.evaluate(outputs, batch)["loss"], [expected], rtol=1e-6)
    np.testing.assert_allclose(task.probabilities(outputs), [[0.5, 0.0, 1 / (1 + np.exp(-1.0))]], rtol=1e-6)


def test_a_set_is_what_differs_from_the_evaluation_data():
    config = default_config()
    config.data.dataset, config.data.data_dir, config.data.eval_split = "folder", "/data", "val"
    config.evaluations = [{"name": "r", "dataset": "imagenet_r", "classes": "own"}]
    validate(config)
    assert default_set(config) == EvaluationSet("", "folder", "val", "/data")
    assert named_sets(config) == (EvaluationSet("r", "imagenet_r", "val", "/data", "own"),)
    stored = json.loads(config.to_json())
    assert named_sets(migrate(stored, where="")) == named_sets(config)
    del stored["evaluations"]
    assert named_sets(migrate(stored, where="")) == ()


@pytest.mark.parametrize(
    "entry",
    [
        {"split": "test"},
        {"name": "x", "splt": "test"},
        {"name": "a/b"},
        {"name": "x", "classes": ()},
        {"name": "x", "classes": "cat"},
        {"name": "x", "classes": (1,)},
        {"name": "x", "split": ""},
        {"name": "all"},
        "x",
    ],
)
def test_what_is_no_set_is_refused(entry):
    config = default_config()
    config.evaluations = (entry,)
    with pytest.raises(ValueError, match=r"config\.evaluations has .*; expected"):
        validate(config)


def test_names_tell_sets_apart():
    config = default_config()
    config.evaluations = ({"name": "x"}, {"name": "x", "split": "test"})
    with pytest.raises(ValueError, match="of the same name"):
        validate(config)


class Unlabelled:
    """Digits whose labels are read with the images, one of which cannot be read."""

    def __init__(self):
        self._source = open_source("digits", "test")
        self.num_classes, self.class_names, self.name = 10, self._source.class_names, self._source.name

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index == self._source.labels.index(3):
            raise OSError("no such block")
        return self._source[index]


def test_classes_are_selected_where_labels_lie_with_images():
    known, read = open_source("digits", "test"), Unlabelled()
    for source, missing in ((known, 0), (read, 1)):
        selected = select_classes(source, ("3", "7"), "the data")
        labels = [selected[index]["label"] for index in range(len(selected))]
        assert set(labels) == {3, 7}
        assert len(labels) == sum(label in (3, 7) for label in known.labels) - missing
        assert selected.class_names == known.class_names
        assert selected.name(0) == known.name(next(i for i, label in enumerate(known.labels) if label == 7))
    with pytest.raises(ValueError, match="the data has no class 'three'"):
        select_classes(known, ("three",), "the data")
