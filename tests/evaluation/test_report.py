import json

import numpy as np
import pytest

from vir_jax.data import open_source
from vir_jax.evaluation import Predictions, evaluate_workdir, format_report, report, write_report
from vir_jax.evaluation.report import calibration_error, class_accuracy, confusion
from vir_jax.runs.config import default_config
from vir_jax.tasks.classification import Classification
from vir_jax.training.evaluation_data import EvaluationData
from vir_jax.training.loop import train


def test_confusion_counts_what_each_class_is_taken_for():
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 1, 1, 1, 3, 3])
    counts = confusion(labels, predicted, 4)
    np.testing.assert_array_equal(counts, [[1, 2, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(class_accuracy(counts), [1 / 3, 1 / 2, np.nan, 1.0])


@pytest.mark.parametrize(
    ("probability", "correct", "bins", "expected"),
    [
        # One bin: right half of the time, sure of 0.8.
        ([0.7, 0.9], [True, False], 1, 0.3),
        # (0, 1/2]: two images, 0.3 in the mean, one right: 2/3 * 0.2; (1/2, 1]: 0.9, right: 1/3 * 0.1.
        ([0.2, 0.4, 0.9], [True, False, True], 2, 2 / 3 * 0.2 + 1 / 3 * 0.1),
        # A bound belongs to the bin below it, and 0 to the first.
        ([0.0, 0.5, 1.0], [True, False, True], 2, 2 / 3 * 0.25),
        ([1.0, 1.0], [True, True], 15, 0.0),
    ],
)
def test_calibration_error_by_hand(probability, correct, bins, expected):
    found = calibration_error(np.array(probability), np.array(correct), bins=bins)
    assert found == pytest.approx(expected, abs=1e-12)


class Images:
    class_names = ("cat", "dog", "owl")
    num_classes = 3

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise IndexError(index)

    def name(self, index):
        return f"{index}.png"


def predictions_of(binary=False, classes=None):
    config = default_config()
    config.bce_loss = binary
    task = Classification(config, Images.class_names)
    data = EvaluationData("", Images(), task if classes is None else task.among(classes))
    found = Predictions()
    batches = [([[0.0, np.log(3.0), -9e9], [9.0, 0.0, 0.0]], [1, 0], [True, False])]
    batches += [([[0.0, 0.0, 5.0], [0.0, np.log(3.0), -9e9]], [2, 0], [True, True])]
    batches += [([[7.0, 0.0, 0.0]] * 2, [0, 0], [False, False])]  # Padding.
    for outputs, label, mask in batches:
        batch = {"label": np.array(label), "mask": np.array(mask)}
        found(data, np.asarray(outputs, np.float32), batch)
    return found


def test_a_line_for_each_image():
    sure = round(1 / (1 + 2 * np.exp(-5.0)), 6)
    assert list(predictions_of().lines()) == [
        {"name": "0.png", "label": "dog", "predicted": "dog", "probability": 0.75},
        {"name": "1.png", "error": "it could not be read"},
        {"name": "2.png", "label": "owl", "predicted": "owl", "probability": pytest.approx(sure, abs=2e-6)},
        {"name": "3.png", "label": "cat", "predicted": "dog", "probability": 0.75},
    ]


def test_with_bce_loss_each_class_has_a_probability_of_its_own():
    lines = list(predictions_of(binary=True).lines())
    assert lines[2]["probability"] == pytest.approx(1 / (1 + np.exp(-5.0)), abs=1e-6)
    assert lines[0]["probability"] == pytest.approx(0.75)


def test_what_cannot_be_chosen_is_not_predicted():
    assert {line.get("predicted") for line in predictions_of(classes=["cat", "owl"]).lines()} == {
        "cat",
        "owl",
        None,
    }


def test_report(tmp_path):
    found = report(predictions_of())
    # Sure of 0.75, right in one of two; sure of 0.9867, and right.
    sure = 1 / (1 + 2 * np.exp(-5.0))
    assert found.pop("calibration_error") == pytest.approx(2 / 3 * 0.25 + 1 / 3 * (1 - sure), abs=1e-6)
    assert found == {
        "images": 3,
        "top1": 2 / 3,
        "calibration_bins": 15,
        "classes": ["cat", "dog", "owl"],
        "class_images": [1, 1, 1],
        "class_accuracy": [0.0, 1.0, 1.0],
        "confusion": [[0, 1, 0], [0, 1, 0], [0, 0, 1]],
    }


def test_the_table_says_what_many_classes_are_taken_for():
    few = report(predictions_of())
    assert format_report(few).splitlines()[:2] == [
        "class  images    top-1  cat  dog  owl",
        "cat         1    0.00%    .    1    .",
    ]
    many = {**few, "classes": [*few["classes"], *map(str, range(30))]}
    many["confusion"] = [[*row, *[0] * 30] for row in few["confusion"]] + [[0] * 33] * 30
    many["class_images"], many["class_accuracy"] = [1, 1, 1, *[0] * 30], [0.0, 1.0, 1.0, *[None] * 30]
    lines = format_report(many).splitlines()
    assert lines[1].endswith("dog (1)")
    assert lines[2].endswith("-")
    assert len(lines) == 5


def test_predictions_of_a_run(digits_config, two_devices, tmp_path):
    config = digits_config
    config.evaluations = ({"name": "even", "classes": ("0", "2", "4", "6", "8")},)
    metrics = train(config, tmp_path / "run")
    found = Predictions()
    evaluate_workdir(tmp_path / "run", observe=found)
    source = open_source("digits", "test")
    lines = list(found.lines())
    assert [line["label"] for line in lines] == [source.class_names[label] for label in source.labels]
    assert np.mean([line["label"] == line["predicted"] for line in lines]) == pytest.approx(metrics["top1"])
    found.write(tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == lines
    write_report(tmp_path / "report.json", report(found))
    assert json.loads((tmp_path / "report.json").read_text())["top1"] == pytest.approx(metrics["top1"])
    with pytest.raises(ValueError, match="of one evaluation set"):
        evaluate_workdir(tmp_path / "run", evaluations="all", observe=Predictions())
