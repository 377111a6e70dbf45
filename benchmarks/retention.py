"""Time and memory of every mode of retention: `python -m benchmarks.retention`, some six minutes on two cores.

Forward, and value and gradient by q, k and v, of 12 heads of 64 in fp32, beside `jax.nn.dot_product_attention` (no
mask, as in ViT). Memory is the compiled program's temporary memory, all but its arguments and results. What would
take more than MEMORY_LIMIT is compiled, for its memory, and not run. Writes benchmarks/results/retention.{md,json}.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import machine, markdown_table, median_ms, write_results
from vir_jax.ops import MODES, retention, retention_2d, vir_log_decay

HEADS, WIDTH = 12, 64
SEQUENCES = ((64, 8), (128, 8), (197, 8), (577, 4), (1025, 2), (4097, 1), (16384, 1))  # tokens, batch
# And a class token each; the last are as wide as images of 8192 pixels are for patches of 16.
GRIDS = (((14, 14), 8), ((24, 24), 4), ((32, 32), 2), ((64, 64), 1), ((128, 128), 1), ((32, 512), 1))
PASSES = ("forward", "value and gradient")
SOFTMAX, OTHER_CHUNKS = "softmax attention", "chunkwise, chunks of 64"
MEMORY_LIMIT = 6 * 2**30

Operator = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass
class Record:
    """One measurement: an operator at one size, in one pass. `ms` is None where it was not run."""

    op: str
    size: str
    mode: str
    which: str
    ms: float | None
    temp_bytes: int
    qkvo_bytes: int

    def cell(self) -> str:
        """Milliseconds, and MiB in parentheses."""
        ms = "not run" if self.ms is None else f"{self.ms:.1f}" if self.ms < 100 else f"{self.ms:.0f}"
        return f"{ms} ({self.temp_bytes / 2**20:.0f})"


def _output_of(function: Callable[..., tuple[jax.Array, jax.Array]], **options: Any) -> Operator:
    """The function without the state that it returns besides."""
    return lambda q, k, v: function(q, k, v, **options)[0]


def _inputs(n: int, batch: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(batch, n, HEADS, WIDTH)), jnp.float32) for _ in range(3)]


def _compiled(operator: Operator, which: str, inputs: list[jax.Array]) -> Any:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(operator(q, k, v) ** 2)

    function = operator if which == "forward" else jax.value_and_grad(loss, argnums=(0, 1, 2))
    return jax.jit(function).lower(*inputs).compile()


def _measure(op: str, size: str, operators: dict[str, Operator], n: int, batch: int) -> list[Record]:
    inputs = _inputs(n, batch)
    records = []
    for which in PASSES:
        compiled = {mode: _compiled(operator, which, inputs) for mode, operator in operators.items()}
        temp = {mode: each.memory_analysis().temp_size_in_bytes for mode, each in compiled.items()}
        runs = {m: partial(each, *inputs) for m, each in compiled.items() if temp[m] <= MEMORY_LIMIT}
        ms = median_ms(runs)
        total = 4 * inputs[0].nbytes
        records += [Record(op, size, mode, which, ms.get(mode), temp[mode], total) for mode in operators]
    return records


def _measure_sequences() -> list[Record]:
    op = partial(_output_of, retention, log_decay=vir_log_decay(HEADS))
    operators = {mode: op(mode=mode) for mode in (*MODES, "auto")}
    operators[OTHER_CHUNKS] = op(mode="chunkwise", chunk_size=64)
    operators[SOFTMAX] = jax.nn.dot_product_attention
    records = []
    for n, batch in SEQUENCES:
        records += _measure("retention", f"N={n} (b={batch})", operators, n, batch)
    return records


def _measure_grids() -> list[Record]:
    records = []
    for grid, batch in GRIDS:
        op = partial(_output_of, retention_2d, log_decay=vir_log_decay(HEADS), grid=grid)
        operators = {mode: op(mode=mode) for mode in (*MODES, "auto")}
        size = f"{grid[0]}x{grid[1]} + 1 (b={batch})"
        records += _measure("retention_2d", size, operators, math.prod(grid) + 1, batch)
    return records


def auto_over_best(records: list[Record]) -> float:
    """How many times as long as the best mode "auto" took, given one operator's records at one size."""
    ms = {record.mode: record.ms for record in records if record.ms is not None}
    return ms["auto"] / min(ms[mode] for mode in MODES if mode in ms)


def _table(records: list[Record], op: str, which: str) -> str:
    chosen = [record for record in records if (record.op, record.which) == (op, which)]
    sizes = list(dict.fromkeys(record.size for record in chosen))
    modes = list(dict.fromkeys(record.mode for record in chosen))
    by_key = {(record.mode, record.size): record for record in chosen}
    rows = [[mode, *(by_key[mode, size].cell() for size in sizes)] for mode in modes]
    ratios = [auto_over_best([by_key[mode, size] for mode in modes]) for size in sizes]
    rows.append(["auto / best mode", *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown_table([which, *sizes], rows)


def main() -> None:
    """Measures, prints and writes."""
    records = _measure_sequences() + _measure_grids()
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    parts = [
        "# Retention: time in milliseconds (temporary memory in MiB)\n",
        f"`python -m benchmarks.retention`; {HEADS} heads of {WIDTH}, fp32; {where}.\n",
    ]
    for op in ("retention", "retention_2d"):
        parts += [f"## {op}\n", *(_table(records, op, which) for which in PASSES)]
    markdown = "\n".join(parts)
    write_results("retention", markdown, records)
    print(markdown)


if __name__ == "__main__":
    main()
