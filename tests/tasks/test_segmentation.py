"""Segmentation: IoU by hand, pixels without a label, a run from the first step to evaluation in every mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vir_jax.data import open_source
from vir_jax.data.digits_scenes import DigitsScenesSource
from vir_jax.evaluation import evaluate_workdir
from vir_jax.parallel.sharding import dotted
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.config import default_config
from vir_jax.runs.load import load_run
from vir_jax.runs.model import model_functions
from vir_jax.runs.validate import validate
from vir_jax.tasks import make_task
from vir_jax.tasks.segmentation import check_segments, confusion, intersection_over_union
from vir_jax.training.evaluate import evaluation_sums
from vir_jax.training.finetune import fit_params
from vir_jax.training.loop import train
from vir_jax.training.transfer import without_gradients

NAMES = ("sky", "tree", "road")
LABELS = jnp.array([[[0, 1], [2, 255]], [[1, 1], [255, 0]]], jnp.uint8)
PREDICTED = jnp.array([[[0, 2], [2, 2]], [[1, 0], [1, 0]]])


def small_config():
    config = default_config()
    config.task, config.epochs, config.batch_size, config.eval_batch_size = "segmentation", 1.0, 8, 8
    config.model.name, config.model.image_size, config.model.readout = "vir_pico8", (32, 32), "dense_patch"
    config.data.dataset, config.data.eval_split, config.data.threads = "digits_scenes", "test", 2
    config.augment.crop, config.augment.hflip = "pad", 0.5
    return config


@pytest.fixture(scope="module")
def task():
    return make_task(small_config(), NAMES)


def logits_of(predicted):
    return 5.0 * jax.nn.one_hot(predicted, 3)


class Some(DigitsScenesSource):
    """The first scenes of a split."""

    def __len__(self):
        return 24


# --- Metrics by hand ---


def test_confusion_by_hand():
    """Rows are labels; the two pixels without one are in no row."""
    counts = confusion(LABELS, PREDICTED, 3)
    np.testing.assert_array_equal(
        counts, [[[1, 0, 0], [0, 0, 1], [0, 0, 1]], [[1, 0, 0], [1, 1, 0], [0, 0, 0]]]
    )


def test_iou_by_hand():
    counts = np.array([[3.0, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 0, 5, 0]])
    iou = intersection_over_union(counts)
    # Of class 2 there is no pixel, but five were taken for it; class 3 is never found.
    np.testing.assert_allclose(iou, [3 / 6, 4 / 7, 0, 0])
    absent = intersection_over_union(np.array([[2.0, 0], [0, 0]]))
    np.testing.assert_array_equal(absent, [1, np.nan])


def test_metrics_of_a_set_are_those_of_all_its_pixels(task):
    """Not the mean over images; padding counts nothing."""
    labels, predicted = (jnp.concatenate([x, jnp.zeros_like(x[:1])]) for x in (LABELS, PREDICTED))
    batch = {"label": labels, "mask": jnp.array([True, True, False])}
    outputs = logits_of(predicted)
    sums = {
        name: np.asarray(x, np.float64) for name, x in evaluation_sums(task, outputs, outputs, batch).items()
    }
    assert sums["count"] == 2
    metrics = task.metrics({name: sums[name] / 2 for name in ("confusion", "cross_entropy")})
    # sky: 2 right of 2, taken for it 3; tree: 1 of 3, taken 1; road: 1 of 1, taken 2.
    expected = {"iou/sky": 2 / 3, "iou/tree": 1 / 3, "iou/road": 1 / 2}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["miou"] == pytest.approx(sum(expected.values()) / 3)
    assert metrics["pixel_accuracy"] == pytest.approx(4 / 6)
    right, wrong = -np.log(np.exp(5) / (np.exp(5) + 2)), -np.log(1 / (np.exp(5) + 2))
    assert metrics["loss"] == pytest.approx((4 * right + 2 * wrong) / 6, rel=1e-5)
    assert task.score(metrics) == metrics["miou"]
    columns = task.columns({"miou": 0.5, "pixel_accuracy": 0.25, "loss": 1.0, "iou/sky": 0.5})
    assert columns == {"mIoU": "50.00%", "pixel accuracy": "25.00%", "loss": "1.0000"}


def test_a_class_that_is_nowhere_has_no_iou(task):
    counts = np.diag([3.0, 0, 1])
    metrics = task.metrics({"confusion": counts, "cross_entropy": np.float64(0)})
    assert "iou/tree" not in metrics
    assert metrics["miou"] == 1


def test_loss_by_hand(task):
    outputs = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 2, 3)), jnp.float32)
    loss, metrics = task.loss(outputs, LABELS)
    log_softmax = np.asarray(jax.nn.log_softmax(outputs))
    known = np.argwhere(np.asarray(LABELS) != 255)
    expected = -sum(log_softmax[*place, LABELS[*place]] for place in known) / 8
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    right = np.asarray(outputs.argmax(-1)) == np.asarray(LABELS)
    assert float(metrics["pixel_accuracy"]) == pytest.approx(right.sum(axis=(1, 2)).mean() / 3)
    # Slices of a batch have the same mean, whatever lacks a label.
    halves = [float(task.loss(outputs[i : i + 1], LABELS[i : i + 1])[0]) for i in range(2)]
    assert np.mean(halves) == pytest.approx(float(loss), rel=1e-6)


def test_pixels_without_a_label_have_no_gradient(task):
    gradient = jax.grad(lambda outputs: task.loss(outputs, LABELS)[0])(logits_of(PREDICTED))
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), LABELS != 255)


# --- What it refuses ---


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.readout", None, "config.model.readout is None; expected one of .*'dense_patch'"),
        (
            "augment.randaugment_ops",
            2,
            "augment.randaugment_ops is 2, which changes images and not their masks",
        ),
        ("augment.erase", 0.25, "augment.erase is 0.25, which changes images"),
        ("augment.transform", "numpy:flip", "augment.transform is 'numpy:flip', which changes images"),
        (
            "mixing.mixup_alpha",
            0.4,
            "config.mixing.mixup_alpha is 0.4, which the task 'segmentation' does not use",
        ),
        ("mixing.cutmix_alpha", 1.0, "config.mixing.cutmix_alpha is 1.0, which the task"),
        ("label_smoothing", 0.1, "config.label_smoothing is 0.1, which the task"),
        ("data.data_dir", "x", "config.data.data_dir is 'x', and nothing reads it"),
    ],
)
def test_what_it_cannot_use_is_refused(field, value, message):
    config = small_config()
    validate(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_a_dense_readout_is_no_classifier_s(task):
    config = small_config()
    config.task, config.data.dataset = "classification", "digits"
    with pytest.raises(
        ValueError, match="readout is 'dense_patch', which gives logits to each pixel; expected"
    ):
        validate(config)
    check_segments(task)
    config.model.readout = None
    with pytest.raises(ValueError, match="task is Classification, which gives no class to each pixel"):
        check_segments(make_task(config, NAMES))


def test_data_of_the_other_kind_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="the training data has a class for each image; expected one for each pix"
    ):
        train(small_config(), tmp_path, train_source=open_source("digits", "train"))


# --- Runs ---


@pytest.fixture(scope="module")
def run(tmp_path_factory, two_devices_throughout):
    workdir = tmp_path_factory.mktemp("segmentation")
    metrics = train(small_config(), workdir, train_source=Some("train"), eval_source=Some("test"))
    return workdir, metrics


def test_a_run_is_trained_and_evaluated_in_every_mode(run):
    workdir, metrics = run
    assert metrics["count"] == 24
    assert 0 < metrics["miou"] < 1
    with CheckpointReader(workdir) as checkpoints:
        assert checkpoints.metrics(checkpoints.resolve("best")) == metrics
    loaded = load_run(workdir, "last")
    check_segments(loaded.task)
    assert (loaded.model.dense, loaded.class_names[0]) == (True, "background")
    results = evaluate_workdir(workdir, source=Some("test"), mode="all")
    assert list(results) == ["parallel", "recurrent", "chunkwise"]
    for result in results.values():
        assert result.metrics["miou"] == pytest.approx(metrics["miou"], abs=1e-3)
        assert list(result.columns) == ["mIoU", "pixel accuracy", "loss"]


def test_a_classifier_s_backbone_is_taken_and_can_be_frozen():
    """Its head starts afresh; of the frozen backbone there is no gradient, in place of one that is not used."""
    with_head, without = small_config().model, small_config().model
    without.readout = None
    plain, dense = model_functions(without, 10), model_functions(with_head, 11)
    old, fresh = (jax.jit(model.init)(jax.random.key(seed)) for seed, model in enumerate((plain, dense)))
    fitted = fit_params(old, shapes=jax.eval_shape(lambda: fresh), head=None)
    missing = {dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(fresh)} - fitted.keys()
    assert missing == {"readout.head.kernel", "readout.head.bias"}
    np.testing.assert_array_equal(
        fitted["stage.blocks.mlp.up.kernel"], old["stage"]["blocks"]["mlp"]["up"]["kernel"]
    )
    apply = without_gradients(dense.apply, ["stem.*", "stage.*"])
    images = jnp.ones((1, 32, 32, 3))
    gradients = jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(apply(params, images)))))(fresh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert bool(jnp.any(leaf)) == dotted(path).startswith("readout."), dotted(path)

    # With the same classes in another order each keeps its own part of the head.
    order = [10, *range(10)]
    reordered = fit_params(fresh, shapes=jax.eval_shape(lambda: fresh), head=order)
    kernel = fresh["readout"]["head"]["kernel"]
    np.testing.assert_array_equal(reordered["readout.head.kernel"], kernel[..., jnp.array(order)])
