"""What each mode of retention would cost a TPU, by its compiler's estimate: `python -m benchmarks.tpu_modes`.

    pip install -r requirements-compile.txt

The operator is compiled for chips that are not there, 12 heads of 64 in bfloat16, alone and with all gradients. The
compiler writes beside each instruction how many clock cycles it expects it to take; they are summed, loops as often as
they run. Nothing is run. What "auto" chooses on a TPU (`vir_jax/ops/sequence.py`, `grid.py`) is from this table.
Writes benchmarks/results/tpu_modes.{md,json} and the table in docs/speed.md.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.timing import markdown_table, replace_between_markers, write_results
from vir_jax.ops import grid_chunkwise, grid_parallel, sequence_chunkwise, sequence_parallel
from vir_jax.ops.gradient import Form, differentiable
from vir_jax.parallel.hlo import estimated_cycles
from vir_jax.training.compile_report import topology_devices

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
HEADS, WIDTH = 12, 64
PASSES = ("forward", "forward and backward")
SEQUENCES = {197: 64, 577: 16, 1025: 16, 4097: 4}
"""Tokens, and the batch."""
GRIDS = {14: 64, 24: 16, 32: 16, 64: 4}
"""Rows and columns of patches, and the batch."""
CHUNKS = (64, 128, 256, 512)
TILES = (8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Record:
    """One compiled program.

    Attributes:
        chip: of `CHIPS`.
        size: tokens, or the patches of a grid.
        form: which.
        which: of `PASSES`.
        tokens: of the batch.
        cycles: that the compiler expects.
        temp_bytes: of memory, all but arguments and results.
    """

    chip: str
    size: str
    form: str
    which: str
    tokens: int
    cycles: int
    temp_bytes: int


def forms(size: int, *, in_2d: bool) -> dict[str, Form]:
    """The forms that are worth comparing at so many tokens, or rows and columns."""
    if not in_2d:
        return {"parallel": sequence_parallel.parallel} | {
            f"chunks of {chunk}": partial(sequence_chunkwise.chunkwise, chunk_size=chunk)
            for chunk in CHUNKS
            if chunk < size
        }
    grid = (size, size)
    return {"parallel": partial(grid_parallel.parallel, grid=grid)} | {
        f"tiles of {side} x {side}": partial(grid_chunkwise.chunkwise, grid=grid, tile_size=(side, side))
        for side in TILES
        if side < size
    }


def measure(chip: str, form: Form, which: str, tokens: int, batch: int) -> tuple[int, int]:
    """Compile one, and return its cycles and the bytes of its memory."""
    mesh = Mesh(np.array(topology_devices(CHIPS[chip])[:1]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((batch, tokens, HEADS, WIDTH), jnp.bfloat16, sharding=place)
    log_decay = jax.ShapeDtypeStruct((HEADS,), jnp.float32, sharding=place)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> jax.Array:
        return differentiable(form, q, k, v, log_decay, None)[0]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> jax.Array:
        return jnp.sum(forward(q, k, v, log_decay).astype(jnp.float32) ** 2)

    function = forward if which == PASSES[0] else jax.grad(loss, argnums=(0, 1, 2))
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(x, x, x, log_decay).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return estimated_cycles(compiled.as_text() or ""), memory.temp_size_in_bytes


def measure_all() -> Iterator[Record]:
    """Every form at every size, on every chip."""
    sizes = [(False, size, batch) for size, batch in SEQUENCES.items()]
    sizes += [(True, size, batch) for size, batch in GRIDS.items()]
    for chip, (in_2d, size, batch) in itertools.product(CHIPS, sizes):
        tokens = size**2 if in_2d else size
        for (name, form), which in itertools.product(forms(size, in_2d=in_2d).items(), PASSES):
            cycles, temp_bytes = measure(chip, form, which, tokens, batch)
            label = f"{size} x {size}" if in_2d else f"N={size}"
            yield Record(chip, label, name, which, batch * tokens, cycles, temp_bytes)


def table(records: Sequence[Record]) -> str:
    """Cycles a token, and KiB a token in parentheses: sizes in lines, forms in columns; the least is bold."""
    parts = []
    for which in PASSES:
        for in_2d in (False, True):
            of = [r for r in records if r.which == which and ("x" in r.size) == in_2d]
            names = list(dict.fromkeys(r.form for r in of))
            rows = []
            for chip, size in dict.fromkeys((r.chip, r.size) for r in of):
                cells = {r.form: r for r in of if (r.chip, r.size) == (chip, size)}
                least = min(r.cycles for r in cells.values())
                rows.append([f"{chip}, {size}", *(_cell(cells.get(name), least) for name in names)])
            if rows:
                kind = "2-D" if in_2d else "1-D"
                parts.append(markdown_table([f"{which}, {kind}", *names], rows))
    return "\n".join(parts)


def _cell(record: Record | None, least: int) -> str:
    if record is None:
        return ""
    cycles = f"{record.cycles / record.tokens:.0f}"
    marked = f"**{cycles}**" if record.cycles == least else cycles
    return f"{marked} ({record.temp_bytes / record.tokens / 2**10:.0f})"


def main() -> None:
    """Compile, print and write."""
    jax.config.update("jax_platforms", "cpu")
    records = []
    for record in measure_all():
        print(record, flush=True)
        records.append(record)
    write_results("tpu_modes", table(records), records)
    PAGE.write_text(replace_between_markers(PAGE.read_text(), "tpu_modes", table(records)))


if __name__ == "__main__":
    main()
