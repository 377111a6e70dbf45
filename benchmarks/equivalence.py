"""How closely every mode agrees with the reference: `python -m benchmarks.equivalence`, about three minutes.

Measures the relative RMS error of outputs, states and gradients against the float64 loops of `vir_jax.ops.reference`,
mode by dtype by number of tokens, and writes the table into docs/modes.md between its markers and into
benchmarks/results/equivalence.{md,json}.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import markdown_table, replace_between_markers, write_results
from vir_jax.ops import MODES, retention, retention_2d, vir_log_decay
from vir_jax.ops.reference import (
    naive_retention,
    naive_retention_2d,
    naive_retention_2d_gradients,
    naive_retention_gradients,
)

PAGE = Path(__file__).parents[1] / "docs" / "modes.md"

HEADS, WIDTH = 4, 32
DTYPES = ("float32", "bfloat16", "float16")
SEQUENCES = (1, 65, 197, 577, 4097)
GRIDS = ((1, 14), (7, 7), (14, 14), (12, 40))  # and a class token each
CHUNK_ROWS = 4  # By itself retention_2d would take these grids for one band each, which is the parallel form.


@dataclasses.dataclass
class Record:
    """One entry: relative RMS errors of the output, the final state and, the largest, of the five gradients."""

    op: str
    size: str
    mode: str
    dtype: str
    output_error: float
    state_error: float
    gradient_error: float


class Op(NamedTuple):
    """An operator at one size, and its loops."""

    name: str
    size: str
    n: int
    state: tuple[int, ...]
    run: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def _relative_rms(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def _inputs(n: int, dtype: str, state: tuple[int, ...]) -> list[jax.Array]:
    """q, k, v, log_decay, initial state, and the cotangents of output and final state."""
    rng = np.random.default_rng(0)
    tokens = [jnp.asarray(rng.normal(size=(1, n, HEADS, WIDTH)), dtype) for _ in range(4)]
    states = [jnp.asarray(rng.normal(size=(1, HEADS, *state)), jnp.float32) for _ in range(2)]
    return [*tokens[:3], vir_log_decay(HEADS), states[0], tokens[3], states[1]]


def _errors(op: Op, inputs: list[jax.Array], mode: str) -> tuple[float, float, float]:
    @jax.jit
    def run(arguments: Any, cotangents: Any) -> Any:
        def at_state(q: Any, k: Any, v: Any, log_decay: Any, state: Any) -> Any:
            chunk = {"chunk_rows": CHUNK_ROWS} if op.name == "retention_2d" and mode == "chunkwise" else {}
            return op.run(q, k, v, log_decay, mode=mode, initial_state=state, **chunk)

        results, pull_back = jax.vjp(at_state, *arguments)
        return results, pull_back(cotangents)

    results, gradients = run(tuple(inputs[:5]), tuple(inputs[5:]))
    q, k, v, log_decay, state, d_out, d_final = (np.asarray(x, np.float64) for x in inputs)
    by_loops = op.forward(q, k, v, log_decay, initial_state=state)
    output_error, state_error = map(_relative_rms, results, by_loops)
    back_by_loops = op.backward(q, k, v, log_decay, initial_state=state, d_out=d_out, d_final=d_final)
    return output_error, state_error, max(map(_relative_rms, gradients, back_by_loops))


def _ops(sequences: Sequence[int], grids: Sequence[tuple[int, int]]) -> list[Op]:
    ops = [
        Op("retention", f"N={n}", n, (WIDTH, WIDTH), retention, naive_retention, naive_retention_gradients)
        for n in sequences
    ]
    for rows, cols in grids:
        functions = (retention_2d, naive_retention_2d, naive_retention_2d_gradients)
        run, forward, backward = (partial(function, grid=(rows, cols)) for function in functions)
        size, n = f"{rows}x{cols} + 1", rows * cols + 1
        ops.append(Op("retention_2d", size, n, (cols, WIDTH, WIDTH), run, forward, backward))
    return ops


def measure(
    sequences: Sequence[int] = SEQUENCES,
    grids: Sequence[tuple[int, int]] = GRIDS,
    dtypes: Sequence[str] = DTYPES,
) -> list[Record]:
    """Measure every mode at these numbers of tokens and (rows, columns), in these dtypes."""
    records = []
    for op in _ops(sequences, grids):
        for dtype in dtypes:
            inputs = _inputs(op.n, dtype, op.state)
            for mode in MODES:
                records.append(Record(op.name, op.size, mode, dtype, *_errors(op, inputs, mode)))
    return records


def _table(records: list[Record], op: str) -> str:
    chosen = [record for record in records if record.op == op]
    sizes = list(dict.fromkeys(record.size for record in chosen))
    cells = {(r.mode, r.dtype, r.size): f"{r.output_error:.0e} / {r.gradient_error:.0e}" for r in chosen}
    rows = [
        [f"{mode}, {dtype}", *(cells[mode, dtype, size] for size in sizes)]
        for dtype in DTYPES
        for mode in MODES
    ]
    return markdown_table([f"`{op}`", *sizes], rows)


def _markdown(records: list[Record]) -> str:
    return (
        "Relative RMS error against the float64 loops of `vir_jax/ops/reference.py` on the same (rounded) inputs,\n"
        "output / worst of the gradients by q, k, v, decay and initial state, with a cotangent on the final state.\n"
        f"{HEADS} heads of {WIDTH}, ViR's decays, standard normal inputs; in 2-D, chunks of {CHUNK_ROWS} rows.\n"
        "An output is rounded to its dtype: 2e-03 in bfloat16, 2e-04 in float16.\n"
        "Written by `python -m benchmarks.equivalence`.\n\n"
        + "\n".join(_table(records, op) for op in ("retention", "retention_2d"))
    )


def main() -> None:
    """Measure, print and write."""
    records = measure()
    markdown = _markdown(records)
    write_results("equivalence", markdown, records)
    PAGE.write_text(replace_between_markers(PAGE.read_text(), "equivalence", markdown))
    print(markdown)


if __name__ == "__main__":
    main()
