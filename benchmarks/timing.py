"""What benchmarks share: fair timing of compiled functions, and tables written as Markdown and JSON."""

import dataclasses
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = Path(__file__).parent / "results"


def median_ms(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 25, budget_s: float = 2.0
) -> dict[str, float]:
    """Median wall time of each call in milliseconds, its result waited for.

    The calls take turns, so that a slow spell of the machine falls on all of them. In each round every call runs that
    has not spent `budget_s` seconds yet. The first run of a call is left out of its median, unless it is the only one.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if sum(times[name]) < budget_s:
                start = time.perf_counter()
                jax.block_until_ready(call())
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(each[1:] or each) for name, each in times.items()}


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What a machine does at best, measured beside what it is compared with.

    Attributes:
        flops: a second, of a float32 product of two square matrices; a multiply-add counts as two.
        bytes: a second, read and written, of a copy that no cache holds.
    """

    flops: float
    bytes: float

    def floor_ms(self, flops: float, moved: float) -> float:
        """Milliseconds that nothing can do without which multiplies so much and moves so many bytes."""
        return 1e3 * max(flops / self.flops, moved / self.bytes)


def median_ms_and_peaks(
    calls: Mapping[str, Callable[[], Any]], *, side: int = 2048, copied: int = 2**28
) -> tuple[dict[str, float], Peaks]:
    """`median_ms` of calls, and the machine's peaks meanwhile.

    A machine's speed drifts within minutes, by a quarter and more where others share it; so a product of two matrices
    and a copy take turns with the calls. Both are measured in JAX and in NumPy, of which the faster counts.
    """
    ours = jnp.ones((side, side), jnp.float32)
    theirs = np.ones((side, side), np.float32)
    long = jnp.ones(copied // 4, jnp.float32)
    source, target = np.ones((2, copied // 4), np.float32)  # Memory that the machine has given already.
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    products = {"product, JAX": lambda: multiply(ours, ours), "product, NumPy": lambda: theirs @ theirs}
    copies = {"copy, JAX": lambda: copy(long), "copy, NumPy": lambda: np.copyto(target, source)}
    # The first call is repeated, uncounted: NumPy's threads spin for a while, and the caches are the copy's.
    first = next(iter(calls.values()))
    ms = median_ms({"first": first, **calls, **products, **copies})
    product, copied_in = (min(ms[name] for name in each) for each in (products, copies))
    peaks = Peaks(2 * side**3 / (1e-3 * product), 2 * copied / (1e-3 * copied_in))
    return {name: ms[name] for name in calls}, peaks


def failure(error: Exception) -> str:
    """What a table says of a measurement that `error` prevented; anything but a lack of memory is printed."""
    if any(text in str(error) for text in ("RESOURCE_EXHAUSTED", "out of memory")):
        return "out of memory"
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}"


def machine() -> dict[str, Any]:
    """Where a measurement was made, as far as it bears on the figures."""
    device = jax.devices()[0]
    allocator = os.environ.get("GLIBC_TUNABLES")
    return {
        "device": device.device_kind if device.platform != "cpu" else processor(),
        "devices": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0)),  # That this process may use.
        "python": platform.python_version(),
        "jax": jax.__version__,
        **({"GLIBC_TUNABLES": allocator} if allocator else {}),
    }


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned and the rest right-aligned."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_results(name: str, markdown: str, records: Sequence[Any]) -> None:
    """Writes results/NAME.md, and results/NAME.json with the machine and one object per record (a dataclass)."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(markdown)
    content = {"machine": machine(), "records": [dataclasses.asdict(record) for record in records]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def replace_between_markers(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` replaced.

    Raises:
        ValueError: the text does not hold each marker once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected {begin} and {end} once each, to write between them")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}{end}{rest.split(end)[1]}"
