"""What a step needs, as compiled: held against what it needed when it was last looked at.

After a change that is meant: `pytest tests/training --update-golden`, and look at the difference.
"""

import dataclasses
import functools
import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest

from tests.test_configs import load
from vir_jax.training import compile_report as module
from vir_jax.training.compile_report import compile_report, format_report, topology_devices

# Several processes of tests may compile for TPUs at a time.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
FOLDER = Path(__file__).parents[1] / "golden" / "compiled"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs requirements-compile.txt"
)
# Versions of the compiler differ by less; a forgotten constraint or a doubled gradient by more.
TOLERANCE = 0.15


@functools.cache
def report(name, topology, fsdp, tensor):
    config, _ = load(name)
    config.mesh.fsdp, config.mesh.tensor = fsdp, tensor
    return compile_report(config, topology, num_classes=10, num_examples=1442)


@pytest.mark.parametrize(
    ("name", "topology", "fsdp", "tensor"),
    [
        ("vir_digits", "cpu:8", 2, 2),
        ("vir_cifar10", "cpu:8", 8, 1),
        pytest.param("vir_digits", "v5e:2x2", 2, 1, marks=needs_libtpu),
    ],
)
def test_memory_and_communication(name, topology, fsdp, tensor, request):
    compiled = report(name, topology, fsdp, tensor)
    assert compiled.fits
    found = {"memory": compiled.memory["total"]} | {
        kind: {"count": traffic.count, "bytes": traffic.bytes}
        for kind, traffic in compiled.collectives.items()
    }
    # For TPUs by the version of their compiler: that of jax 0.10 counts no temporaries in a step as small as this one.
    compiler = "" if topology.startswith("cpu") else "-jax" + ".".join(jax.__version__.split(".")[:2])
    path = FOLDER / f"{name}-{topology.replace(':', '-')}-fsdp{fsdp}-tensor{tensor}{compiler}.json"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert path.exists(), f"{path.name} is not there; --update-golden writes it"
    golden = json.loads(path.read_text())
    assert found.keys() == golden.keys()
    for key, value in golden.items():
        assert found[key] == pytest.approx(value, rel=TOLERANCE), key


@needs_libtpu
def test_a_kernel_needs_no_other_communication():
    config, _ = load("vir_digits")
    config.mesh.fsdp, config.mesh.tensor = 1, 2
    step = functools.partial(compile_report, topology="v5e:2x2", num_classes=10, num_examples=1442)
    by_xla = step(config)
    config.model.implementation = "pallas_tpu"
    assert step(config).collectives == by_xla.collectives


def test_a_kernel_is_asked_for():
    config, _ = load("vir_digits")
    config.model.implementation = "pallas_tpu"
    with pytest.raises(ValueError, match="'pallas_tpu' is a kernel for tpu, and this compiles for cpu"):
        compile_report(config, "cpu:8", num_classes=10, num_examples=1442)


def test_a_step_that_does_not_fit():
    compiled = dataclasses.replace(report("vir_digits", "cpu:8", 2, 2), capacity=2**20)
    assert not compiled.fits
    assert "DOES NOT FIT" in format_report(compiled)
    assert "the device has 1.00 MiB" in format_report(compiled)
    assert "communication  per device and step" in format_report(compiled)
    assert "communication  none" in format_report(dataclasses.replace(compiled, collectives={}))


def test_what_the_compiler_says_of_too_large_a_step():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.29G of"
        " 15.75G hbm. Exceeded hbm capacity by 4.54G.\n\nTotal hbm usage >= 20.81G:"
    )
    assert module._overflow(message) == "Used 20.29G of 15.75G hbm. Exceeded hbm capacity by 4.54G."


@pytest.mark.parametrize("topology", ["v5e", "cpu:0", "cpu:9", "2*cpu:2", "cpu:2x2", "gpu:8x"])
def test_unknown_topologies(topology):
    with pytest.raises(ValueError, match=r"topology '.*': expected"):
        topology_devices(topology)


@needs_libtpu
def test_several_slices():
    devices = topology_devices("2*v5e:2x2")
    assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4
    mesh = module.make_mesh(-1, 4, 1, devices=devices)
    slices = [[device.slice_index for device in row.flat] for row in mesh.devices]
    assert slices == [[0] * 4, [1] * 4]
