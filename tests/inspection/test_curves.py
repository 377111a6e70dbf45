import numpy as np

from vir_jax.inspection.workdir import read_curves
from vir_jax.runs.metrics import MetricsWriter


def test_every_metric_at_its_own_steps(tmp_path):
    with MetricsWriter(tmp_path, start_step=0, total_steps=4) as writer:
        writer.write(2, {"train/loss": 2.5, "train/top1": 0.25})
        writer.write(4, {"train/loss": float("nan"), "train/top1": 0.5})
        writer.write(4, {"eval/top1": 0.75})
    found = read_curves(tmp_path)
    assert set(found) == {"train/loss", "train/top1", "eval/top1"}
    np.testing.assert_array_equal(found["train/loss"].step, [2, 4])
    np.testing.assert_array_equal(found["train/loss"].value, [2.5, np.nan])
    np.testing.assert_array_equal(found["eval/top1"].step, [4])
    np.testing.assert_array_equal(found["eval/top1"].value, [0.75])
