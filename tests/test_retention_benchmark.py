"""What the benchmark of the operator counts, and that what it is compared with computes the same."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import retention as benchmark
from benchmarks import torch_operators
from benchmarks.timing import Peaks, median_ms_and_peaks
from vir_jax.ops import retention, vir_log_decay


def test_the_floor_is_the_longer_of_products_and_copies():
    peaks = Peaks(flops=1e9, bytes=1e8)
    assert peaks.floor_ms(5e6, 1e5) == 5
    assert peaks.floor_ms(1e6, 1e6) == 10


def test_peaks_are_measured():
    ms, peaks = median_ms_and_peaks({"call": lambda: None}, side=64, copied=2**16)
    assert ms.keys() == {"call"}
    assert peaks.flops > 0
    assert peaks.bytes > 0


def test_flops_that_chunks_cannot_do_without():
    """Of 12 heads of 64, in squares of 64 a token: 2 within a chunk, 4 with states that two chunks of three have."""
    square = 12 * 64**2
    assert benchmark._least_flops(64, "forward") == 64 * 2 * square
    assert benchmark._least_flops(192, "forward") == (192 * 2 + 128 * 4) * square
    assert benchmark._least_flops(192, "value and gradient") == (192 * 7 + 128 * 14) * square


def test_table_says_what_was_not_run_or_has_no_memory():
    def record(mode, ms, temp):
        return benchmark.Record("retention", "N=64", mode, "forward", ms, temp, Peaks(1e11, 2e10), 0.5)

    records = [record(mode, 2.0, 2**20) for mode in ("parallel", "recurrent", "chunkwise")]
    records += [
        record("auto", 4.0, 2**20),
        record("softmax attention", None, 2**33),
        record("torch", 1.0, None),
    ]
    table = benchmark._table(records, "retention", "forward")
    for row in (
        "| parallel | 2.0 (1) |",
        "| softmax attention | not run (8192) |",
        "| torch | 1.0 |",
        "| auto / best mode | 2.00 |",
        "| large product, GFLOP/s | 100 |",
        "| copy, GB/s | 20 |",
        "| floor | 0.5 |",
        "| floor / auto | 12% |",
    ):
        assert row in table
    assert benchmark.OVER_CORES not in table  # On one core there is no such row.


@pytest.mark.parametrize("n", [1, 64, 150])
def test_plain_torch_computes_retention(n):
    torch = pytest.importorskip("torch")
    inputs = [np.random.default_rng(i).normal(size=(2, n, 3, 16)).astype(np.float32) for i in range(3)]
    log_decay = vir_log_decay(3)
    ours, _ = retention(*map(jnp.asarray, inputs), log_decay)
    theirs = torch_operators.chunkwise(*map(torch.tensor, inputs), torch.tensor(np.asarray(log_decay)))
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
