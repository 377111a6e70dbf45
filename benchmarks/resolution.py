"""ViR in each mode and as a stream, a pyramid and ViTs beside it, from 224 to 8192 pixels.

One image a call, uint8, normalised by the program, through models with fresh parameters. Every point is a
process of its own, whose peak resident memory is read when it is done. A point is out of memory if its compiled program
asks for more than the machine has. It is not run if that is more than MEMORY_LIMIT, or if the size before took so long
that a cost linear in the patches exceeds TIME_LIMIT; it is stopped at TIME_LIMIT. Nothing is extrapolated.

timm's ViT is the one that most people would take: attention that stores no scores, with torch.compile and without. It
is measured where torch and timm are installed.

    python -m benchmarks.resolution                     # all; --models, --modes and --sizes choose
    python -m benchmarks.resolution --models vir_s16 vir_h_ti --modes chunkwise stream --sizes 224 512 1024 2048
    python -m benchmarks.resolution --report            # tables and figure from what was measured

Writes benchmarks/results/resolution.{md,json}, docs/figures/{resolution,large_images}.png and the table in
docs/speed.md.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import RESULTS, machine, markdown_table, replace_between_markers, write_results
from vir_jax.inference import stream
from vir_jax.models import VisionModel, create_model
from vir_jax.models.pixels import normalize
from vir_jax.models.pyramid_variants import PYRAMID_SIZES
from vir_jax.ops import MODES

ROOT = Path(__file__).parents[1]
SIZES = (224, 512, 1024, 2048, 4096, 8192)
STREAM, ATTENTION, TORCH, TORCH_EAGER = "stream", "attention", "torch.compile", "eager"
STREAM_2D, CHUNKWISE_2D = "stream, 2-D", "chunkwise, 2-D"
IN_2D = (STREAM_2D, CHUNKWISE_2D)
CHUNKWISE_16, STREAM_16, TORCH_EAGER_16 = "chunkwise, bfloat16", "stream, bfloat16", "eager, bfloat16"
IN_BFLOAT16 = (CHUNKWISE_16, STREAM_16, TORCH_EAGER_16)
SERIES = {
    "vir_s16": (*MODES, STREAM, CHUNKWISE_2D, STREAM_2D, CHUNKWISE_16, STREAM_16),
    "vir_b16": (*MODES, STREAM),
    "vir_h_ti": ("chunkwise", STREAM),
    "vit_s16": (ATTENTION,),
    "vit_b16": (ATTENTION,),
    "timm_vit_s16": (TORCH, TORCH_EAGER, TORCH_EAGER_16),
}
AGAINST_THE_BEST_VIT = {"vir_s16": ("chunkwise", STREAM), "timm_vit_s16": (TORCH,)}
TIMM = {"timm_vit_s16": "vit_small_patch16_224"}
MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
MEMORY_LIMIT = 16 * 2**30
TIME_LIMIT = 600.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OK, OUT_OF_MEMORY, NOT_RUN = "ok", "out of memory", "not run"


@dataclasses.dataclass
class Point:
    """A model in one mode at one size, in pixels of a square's side."""

    model: str
    mode: str
    size: int
    status: str
    seconds: float | None = None  # Per image, compilation not counted.
    peak_bytes: int | None = None  # Resident memory of the process, at its highest.
    program_bytes: int | None = None  # What the compiled program asks for: arguments, results, temporaries.

    def cell(self) -> str:
        """Seconds and gigabytes; or why there are none."""
        if self.status == OUT_OF_MEMORY:
            return f"out of memory ({_gigabytes(self.program_bytes)})"
        if self.status == NOT_RUN:
            return "not run" + ("" if self.program_bytes is None else f" ({_gigabytes(self.program_bytes)})")
        return f"{_seconds(self.seconds)} ({_gigabytes(self.peak_bytes)})"


def _seconds(seconds: float | None) -> str:
    assert seconds is not None
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


def _gigabytes(number: int | None) -> str:
    assert number is not None
    return f"{number / 1e9:.2f}" if number < 1e10 else f"{number / 1e9:.0f}"


# --- One point, in a process of its own ---


def _forward(mode: str) -> Callable[[VisionModel, jax.Array], jax.Array]:
    if mode in (STREAM, STREAM_2D, STREAM_16):
        return lambda model, images: stream(model, images, normalization=(MEAN, STD))
    form = {ATTENTION: "parallel", CHUNKWISE_2D: "chunkwise", CHUNKWISE_16: "chunkwise"}.get(mode, mode)
    return lambda model, images: model(normalize(images, MEAN, STD), mode=form)


def measure_torch(name: str, mode: str, size: int, *, run: bool) -> Point:
    """Runs timm's model on two threads, as XLA has them; after a first call, once or up to four times."""
    import timm
    import torch

    if not run:
        return Point(name, mode, size, NOT_RUN)
    model = timm.create_model(TIMM[name], img_size=size).eval()
    if mode == TORCH:
        model = torch.compile(model)
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(colours).reshape(3, 1, 1) for colours in (MEAN, STD))

    if mode == TORCH_EAGER_16:
        model = model.to(torch.bfloat16)
    dtype = next(model.parameters()).dtype

    def forward() -> None:
        with torch.inference_mode():
            model(((images / 255 - mean) / std).to(dtype))

    forward()
    seconds = _median_seconds(forward)
    return Point(name, mode, size, OK, seconds, _peak_bytes())


def _median_seconds(call: Callable[[], Any]) -> float:
    times: list[float] = []
    while len(times) < 4 and sum(times) < 6:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_point(name: str, mode: str, size: int, *, run: bool) -> Point:
    """Compiles, and runs what fits into memory if asked to: once if that takes six seconds, else up to four times."""
    options: dict[str, Any] = {"retention": "2d"} if mode in IN_2D else {}
    if mode in IN_BFLOAT16:
        options["dtype"] = "bfloat16"

    @jax.jit
    def initialise() -> nnx.State:
        return nnx.state(create_model(name, num_classes=1000, rngs=nnx.Rngs(0), **options))

    graph = nnx.graphdef(
        nnx.eval_shape(lambda: create_model(name, num_classes=1000, rngs=nnx.Rngs(0), **options))
    )
    params = initialise()
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8))
    forward = _forward(mode)
    compiled = (
        jax.jit(lambda params, images: forward(nnx.merge(graph, params), images))
        .lower(params, images)
        .compile()
    )
    analysis = compiled.memory_analysis()
    program = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    if program > MACHINE_BYTES:
        return Point(name, mode, size, OUT_OF_MEMORY, program_bytes=program)
    if not run or program > MEMORY_LIMIT:
        return Point(name, mode, size, NOT_RUN, program_bytes=program)
    seconds = _median_seconds(lambda: jax.block_until_ready(compiled(params, images)))
    return Point(name, mode, size, OK, seconds, _peak_bytes(), program)


# --- All points ---


def _measure_series(name: str, mode: str, sizes: Sequence[int]) -> list[Point]:
    points: list[Point] = []
    for size in sizes:
        before = points[-1] if points else None
        growth = 1 if before is None else (size / before.size) ** 2
        run = before is None or (before.status == OK and (before.seconds or 0) * growth < TIME_LIMIT)
        points.append(_in_process(name, mode, size, run=run))
        print(f"{name:8} {mode:12} {size:5}  {points[-1].cell()}", flush=True)
    return points


def _in_process(name: str, mode: str, size: int, *, run: bool) -> Point:
    command = [sys.executable, "-m", "benchmarks.resolution", "--point", name, mode, str(size)]
    if not run:
        command.append("--compile")
    # So that the resident memory is that of the CPU's program alone.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    try:
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=TIME_LIMIT + 30,
        )
    except subprocess.TimeoutExpired:
        return _in_process(name, mode, size, run=False)
    return Point(**json.loads(result.stdout.splitlines()[-1]))


# --- Reports ---


def _load() -> list[Point]:
    path = RESULTS / "resolution.json"
    return [Point(**record) for record in json.loads(path.read_text())["records"]] if path.exists() else []


def _table(points: list[Point]) -> str:
    by_key = {(point.model, point.mode, point.size): point for point in points}
    rows = []
    for name, modes in SERIES.items():
        for mode in modes:
            cells = [by_key.get((name, mode, size)) for size in SIZES]
            if any(cells):
                rows.append([f"{_title(name)}, {mode}", *(cell.cell() if cell else "" for cell in cells)])
    header = [f"{size} px" for size in SIZES]
    tokens = [f"{(size // 16) ** 2 + 1:,} tokens" for size in SIZES]
    return markdown_table(
        ["seconds per image (GB)", *header], [["tokens, of a patch of 16 x 16 each", *tokens], *rows]
    )


def _title(name: str) -> str:
    if name in PYRAMID_SIZES:
        return "ViR-H-" + name.removeprefix("vir_h_").capitalize()
    library, family, size = ("", *name.split("_"))[-3:]
    title = {"vir": "ViR", "vit": "ViT"}[family] + f"-{size[0].upper()}/16"
    return f"{library}'s {title}" if library else title


def crossings(points: list[Point], first: tuple[str, str], second: tuple[str, str]) -> str:
    """Between which measured sizes the first series becomes the faster one, and where the second one stops.

    Nothing where they were not measured.
    """
    at = {(p.model, p.mode, p.size): p for p in points}
    both = [
        (size, at[(*first, size)], at[(*second, size)])
        for size in SIZES
        if (*first, size) in at and (*second, size) in at
    ]
    if not both:
        return ""
    faster = [size for size, a, b in both if a.seconds and b.seconds and a.seconds < b.seconds]
    slower = [size for size, a, b in both if a.seconds and b.seconds and a.seconds >= b.seconds]
    stops = [size for size, _, b in both if b.status == OUT_OF_MEMORY]
    names = [f"{_title(name)} ({mode})" for name, mode in (first, second)]
    if not faster:
        text = f"{names[0]} is faster than {names[1]} at no size measured"
    elif not slower:
        text = f"{names[0]} is faster than {names[1]} from {faster[0]} px, the smallest size measured"
    else:
        text = f"{names[0]} becomes faster than {names[1]} between {slower[-1]} and {faster[0]} px"
    return text + (f"; the latter is out of memory at {stops[0]} px" if stops else "") + ".\n"


def markdown(points: list[Point]) -> str:
    """Returns the table of all points measured so far, and where its lines cross."""
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    pairs = [
        ((f"vir_{s}16", STREAM), other)
        for s in "sb"
        for other in ((f"vir_{s}16", "parallel"), (f"vit_{s}16", ATTENTION))
    ]
    pairs += [(("vir_s16", mode), ("timm_vit_s16", TORCH)) for mode in ("chunkwise", STREAM)]
    pairs += [(("vir_h_ti", mode), ("vir_s16", mode)) for mode in SERIES["vir_h_ti"]]
    lines = [f"- {crossing}" for pair in pairs if (crossing := crossings(points, *pair))]
    return (
        "Seconds per image and, in parentheses, the peak resident memory of the process in GB, compilation and image\n"
        f"included. One image, float32 where nothing else is said; {where}.\n"
        f"Out of memory: the compiled program asks for the GB in parentheses, and the machine has "
        f"{_gigabytes(MACHINE_BYTES)}.\n"
        f"Not run: it would take more than {TIME_LIMIT:.0f} s, or asks, as said in parentheses, for more than "
        f"{_gigabytes(MEMORY_LIMIT)}.\n"
        "Written by `python -m benchmarks.resolution`.\n\n" + _table(points) + "\n" + "".join(lines)
    )


def report(points: list[Point]) -> None:
    """Writes tables, figure and docs/speed.md from all points measured so far."""
    text = markdown(points)
    write_results("resolution", "# Resolution\n\n" + text, points)
    page = ROOT / "docs" / "speed.md"
    page.write_text(replace_between_markers(page.read_text(), "resolution", text))
    _draw(points, SERIES, "resolution")
    _draw(points, AGAINST_THE_BEST_VIT, "large_images")
    print(text)


def _draw(points: list[Point], shown: Mapping[str, Sequence[str]], name_of_figure: str) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    colours = {
        "parallel": "C3",
        "recurrent": "C1",
        "chunkwise": "C0",
        STREAM: "C2",
        STREAM_2D: "C4",
        CHUNKWISE_2D: "C6",
        ATTENTION: "0.2",
        TORCH: "C5",
        TORCH_EAGER: "C9",
        CHUNKWISE_16: "C0",
        STREAM_16: "C2",
        TORCH_EAGER_16: "C9",
    }
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for name, modes in shown.items():
        line, marker = (
            (":", "^") if name in PYRAMID_SIZES else ("-", "o") if name.endswith("s16") else ("--", "s")
        )
        style: dict[str, Any] = {"marker": marker, "markersize": 4}
        for mode in modes:
            style["linestyle"] = "-." if mode in IN_BFLOAT16 else line
            series = sorted((p for p in points if (p.model, p.mode) == (name, mode)), key=lambda p: p.size)
            run = [p for p in series if p.status == OK]
            if not run:
                continue
            label = _title(name) + ("" if mode == ATTENTION else f", {mode}")
            x = [p.size for p in run]
            time_axes.plot(x, [p.seconds for p in run], color=colours[mode], label=label, **style)
            memory_axes.plot(
                x, [(p.peak_bytes or 0) / 1e9 for p in run], color=colours[mode], label=label, **style
            )
            lost = [p for p in series if p.status == OUT_OF_MEMORY][:1]
            for p in lost:
                memory_axes.plot(
                    p.size,
                    (p.program_bytes or 0) / 1e9,
                    "x",
                    color=colours[mode],
                    markersize=9,
                    markeredgewidth=2,
                )
    if any(p.status == OUT_OF_MEMORY and p.mode in shown.get(p.model, ()) for p in points):
        memory_axes.axhline(MACHINE_BYTES / 1e9, color="0.6", linewidth=1)
        text = "the machine's memory; crosses: what a program asks for"
        memory_axes.text(SIZES[0], MACHINE_BYTES / 1e9 * 1.1, text, color="0.4", fontsize=8)
    for axes, title in (
        (time_axes, "Seconds per image"),
        (memory_axes, "Peak resident memory of the process, GB"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="side of the image, pixels", title=title)
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if axes is memory_axes else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(color="0.9")
    handles, labels = time_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(ROOT / "docs" / "figures" / f"{name_of_figure}.png", dpi=130)
    plt.close(figure)


def main() -> None:
    """Measures the models named, or one point, or reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = list(dict.fromkeys(mode for series in SERIES.values() for mode in series))
    parser.add_argument("--models", nargs="+", choices=SERIES, default=SERIES, help="default: all")
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes, help="default: each model's own")
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=SIZES, help="default: all")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, write tables and figure again"
    )
    parser.add_argument("--compile", action="store_true", help="of a point, the memory it asks for alone")
    parser.add_argument(
        "--point", nargs=3, metavar=("MODEL", "MODE", "SIZE"), help="measure one point, print it"
    )
    arguments = parser.parse_args()
    if arguments.point:
        name, mode, size = arguments.point
        measure = functools.partial(measure_torch if name in TIMM else measure_point, name, mode)
        print(json.dumps(dataclasses.asdict(measure(int(size), run=not arguments.compile))))
        return
    points = _load()
    here = [name for name in arguments.models if name not in TIMM or importlib.util.find_spec("timm")]
    for name in () if arguments.report else here:
        for mode in (mode for mode in SERIES[name] if mode in arguments.modes):
            new = _measure_series(name, mode, arguments.sizes)
            measured = {(p.model, p.mode, p.size) for p in new}
            points = [p for p in points if (p.model, p.mode, p.size) not in measured] + new
            write_results("resolution", "", points)
    report(points)


if __name__ == "__main__":
    main()
