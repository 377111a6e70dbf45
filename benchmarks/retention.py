"""Time and memory of every mode of retention: `python -m benchmarks.retention`, some ten minutes on two cores.

Forward, and value and gradient by q, k and v, of 12 heads of 64 in fp32, beside `jax.nn.dot_product_attention` (no
mask, as in ViT) and, where torch is installed, what its users have: chunks in plain torch, and its attention. JAX 0.10
multiplies batches of matrices on one core of a CPU, however large they are; so "auto" is measured with its heads split
over a device for each core, too; and, where there is a C++ compiler, the kernel for CPUs. Memory is the compiled
program's temporary memory, all but its arguments and results, of one device. What would take more than MEMORY_LIMIT is
compiled, for its memory, and not run.

The floor is what nothing that reads chunks of 64 can do without on this machine: their multiply-adds at the speed of
one large product, or the arrays' bytes at that of a copy, both of which take turns with what they are compared with.

Writes benchmarks/results/retention.{md,json} and the table of 1-D in docs/speed.md.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import torch_operators
from benchmarks.timing import (
    Peaks,
    machine,
    markdown_table,
    median_ms,
    median_ms_and_peaks,
    replace_between_markers,
    write_results,
)
from vir_jax.ops import MODES, retention, retention_2d, vir_log_decay

HEADS, WIDTH = 12, 64
SEQUENCES = ((64, 8), (128, 8), (197, 8), (577, 4), (1025, 2), (4097, 1), (16384, 1))  # tokens, batch
# And a class token each; the last are as wide as images of 8192 pixels are for patches of 16.
GRIDS = (((14, 14), 8), ((24, 24), 4), ((32, 32), 2), ((64, 64), 1), ((128, 128), 1), ((32, 512), 1))
PASSES = ("forward", "value and gradient")
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
SOFTMAX, OTHER_CHUNKS, OVER_CORES = (
    "softmax attention",
    "chunkwise, chunks of 64",
    "auto, a device for each core",
)
KERNEL = "cpp_cpu"
BY_HEADS = PartitionSpec(None, None, "heads", None)
MEMORY_LIMIT = 6 * 2**30

Operator = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass
class Record:
    """One measurement: an operator at one size, in one pass.

    `ms` is None where it was not run, `temp_bytes` of torch, `peaks` and `floor_ms` of 2-D retention, which does more.
    """

    op: str
    size: str
    mode: str
    which: str
    ms: float | None
    temp_bytes: int | None
    peaks: Peaks | None
    floor_ms: float | None

    def cell(self) -> str:
        """Milliseconds, and MiB in parentheses where they are known."""
        ms = "not run" if self.ms is None else _ms(self.ms)
        return ms if self.temp_bytes is None else f"{ms} ({self.temp_bytes / 2**20:.0f})"


def _ms(ms: float) -> str:
    return f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


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


def _least_flops(n: int, which: str) -> int:
    """Count those of n tokens in chunks as long as heads are wide, a multiply-add as two.

    A product within a chunk needs d^2 of a token and head, its causal half; one with a state 2 d^2, but none of the
    first or of the last chunk. Two and two forward; five and five more backward, which computes the states again.
    """
    products = 2 if which == "forward" else 7
    return HEADS * WIDTH**2 * products * (n + 2 * max(n - WIDTH, 0))


def _over_cores(inputs: list[jax.Array]) -> tuple[Operator, list[jax.Array]]:
    """Retention with the heads split over the CPU's devices, and the inputs so split."""
    mesh = jax.make_mesh((jax.local_device_count("cpu"),), ("heads",), axis_types=(AxisType.Auto,))
    log_decay = vir_log_decay(HEADS)
    split = jax.shard_map(
        lambda q, k, v, log_decay: retention(q, k, v, log_decay)[0],
        mesh=mesh,
        in_specs=(BY_HEADS, BY_HEADS, BY_HEADS, PartitionSpec("heads")),
        out_specs=BY_HEADS,
    )
    placed = [jax.device_put(x, NamedSharding(mesh, BY_HEADS)) for x in inputs]
    return lambda q, k, v: split(q, k, v, log_decay), placed


def _measure(op: str, size: str, operators: dict[str, Operator], n: int, batch: int) -> list[Record]:
    inputs = _inputs(n, batch)
    given = {mode: (operator, inputs) for mode, operator in operators.items()}
    if op == "retention" and jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        given[OVER_CORES] = _over_cores(inputs)
    records = []
    for which in PASSES:
        compiled = {mode: _compiled(operator, which, placed) for mode, (operator, placed) in given.items()}
        temp = {mode: each.memory_analysis().temp_size_in_bytes for mode, each in compiled.items()}
        runs: dict[str, Callable[[], Any]] = {
            m: partial(each, *given[m][1]) for m, each in compiled.items() if temp[m] <= MEMORY_LIMIT
        }
        peaks, floor = None, None
        if op == "retention":
            if torch_operators.installed():
                runs |= torch_operators.calls(inputs, vir_log_decay(HEADS), gradient=which != "forward")
            if SOFTMAX in runs:  # Last in each round, for it leaves the caches cold to what follows.
                runs[SOFTMAX] = runs.pop(SOFTMAX)
            ms, peaks = median_ms_and_peaks(runs)
            arrays = 4 if which == "forward" else 6  # q, k, v and what is written
            floor = peaks.floor_ms(_least_flops(n, which) * batch, arrays * inputs[0].nbytes)
        else:
            ms = median_ms(runs)
        names = dict.fromkeys([*given, *runs])
        records += [
            Record(op, size, name, which, ms.get(name), temp.get(name), peaks, floor) for name in names
        ]
    return records


def _kernel_installed() -> bool:
    return jax.default_backend() == "cpu" and shutil.which("c++") is not None


def _measure_sequences() -> list[Record]:
    op = partial(_output_of, retention, log_decay=vir_log_decay(HEADS))
    operators = {mode: op(mode=mode) for mode in (*MODES, "auto")}
    operators[OTHER_CHUNKS] = op(mode="chunkwise", chunk_size=64)
    if _kernel_installed():
        operators[KERNEL] = op(implementation=KERNEL)
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
        if _kernel_installed():
            operators[KERNEL] = op(implementation=KERNEL)
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
    floors = {record.size: record.floor_ms for record in chosen if record.floor_ms is not None}
    peaks = {record.size: record.peaks for record in chosen if record.peaks is not None}
    if floors:
        rows.append(["large product, GFLOP/s", *(f"{each.flops / 1e9:.0f}" for each in peaks.values())])
        rows.append(["copy, GB/s", *(f"{each.bytes / 1e9:.0f}" for each in peaks.values())])
        rows.append(["floor", *(_ms(floor) for floor in floors.values())])
        for mode in [mode for mode in ("auto", OVER_CORES, KERNEL) if mode in modes]:
            found = [(floor, by_key[mode, size].ms) for size, floor in floors.items()]
            rows.append([f"floor / {mode}", *(f"{floor / ms:.0%}" if ms else "" for floor, ms in found)])
    return markdown_table([which, *sizes], rows)


def of_sequences(records: list[Record]) -> str:
    """The tables of 1-D, and on what they were measured."""
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    return "\n".join(
        [
            "Milliseconds, and in parentheses temporary memory in MiB.\n"
            f"`python -m benchmarks.retention`; {HEADS} heads of {WIDTH}, float32; {where}.\n",
            *(_table(records, "retention", which) for which in PASSES),
        ]
    )


def main() -> None:
    """Measures, prints and writes."""
    jax.config.update("jax_num_cpu_devices", math.gcd(HEADS, len(os.sched_getaffinity(0))))
    records = _measure_sequences() + _measure_grids()
    sequences = of_sequences(records)
    in_2d = "\n".join(_table(records, "retention_2d", which) for which in PASSES)
    markdown = f"# Retention\n\n{sequences}\n## In two dimensions\n\n{in_2d}"
    write_results("retention", markdown, records)
    PAGE.write_text(replace_between_markers(PAGE.read_text(), "retention", sequences))
    print(markdown)


if __name__ == "__main__":
    main()
