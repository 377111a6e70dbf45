import jax.numpy as jnp
import numpy as np

from vir_jax.runs.config import default_config
from vir_jax.tasks.classification import Classification, in_top_k


def test_in_top_k():
    logits = jnp.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [1.0, 1.0, 1.0], [jnp.nan, jnp.nan, jnp.nan]])
    labels = jnp.array([1, 2, 1, 0])
    np.testing.assert_array_equal(in_top_k(logits, labels, 1), [True, False, False, False])
    np.testing.assert_array_equal(in_top_k(logits, labels, 2), [True, False, True, False])
    np.testing.assert_array_equal(in_top_k(logits, labels, 3), [True, True, True, False])


def test_binary_cross_entropy_by_hand():
    config = default_config()
    config.bce_loss = True
    task = Classification(config, "012")
    logits, targets = jnp.array([[2.0, -1.0, 0.5]]), jnp.array([[0.7, 0.3, 0.0]])
    shown = 1 / (1 + np.exp(-np.asarray(logits)))
    expected = -np.sum(targets * np.log(shown) + (1 - targets) * np.log(1 - shown))
    np.testing.assert_allclose(task.loss(logits, targets)[0], expected, rtol=1e-6)
    one_hot = np.array([[0, 0, 1]])
    evaluated = task.evaluate(logits, {"label": jnp.array([2], jnp.int32)})["loss"]
    expected = -np.sum(one_hot * np.log(shown) + (1 - one_hot) * np.log(1 - shown), axis=1)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-6)


def test_metrics_as_text():
    task = Classification(default_config(), "0123456789")
    columns = task.columns({"top1": 0.1234, "top5": 0.5, "loss": 2.0, "count": 7})
    assert columns == {"top-1": "12.34%", "top-5": "50.00%", "loss": "2.0000"}
    assert task.score({"top1": 0.5, "loss": 9.0}) == 0.5


def test_a_mixed_image_counts_as_the_class_it_holds_most_of():
    task = Classification(default_config(), "01")
    _, metrics = task.loss(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.7, 0.3], [0.3, 0.7]]))
    assert metrics["top1"] == 0.5
