"""Every test sees eight simulated CPU devices, so that sharded code is tested as it runs on a pod.

Most of a test's time is compilation. Machine code is left unoptimised, which takes half the time, and kept for tests,
processes and runs that compile the same again. The command-line tests start processes without the first: there the code
runs as a user's does.
"""

import atexit
import functools
import gc
import importlib
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from jax._src.interpreters.partial_eval import DynamicJaxprTracer

import vir_jax.training.loop
from vir_jax.ops import kernels
from vir_jax.ops.platform import platform as platform_in_context
from vir_jax.runs.config import default_config

# One part of machine code a program, not 32 to be compiled side by side: there is a worker for each core already.
XLA_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
# The quicker of two code generators; later versions have the other alone.
if jax.__version_info__ < (0, 11):
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS])
# In the environment, so that xdist's workers and processes started by tests share it; gone after the session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vir_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_num_cpu_devices", 8)
# Of every random key that is drawn under a trace Flax asks for the sharding, twice, and JAX's answer, that there is
# none, tells in some milliseconds where the tracer came from. A tenth of what making a model takes.
DynamicJaxprTracer._origin_msg = lambda self: ""
# Of an error JAX tells apart whose frames are its own, file by file.
jax.config.update("jax_traceback_filtering", "off")
# JAX's plug-in for GPUs may be there without a GPU, to compile for one.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"


# What is imported stays: the collector need not look at it again and again.
gc.freeze()
gc.set_threshold(200_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_file():
    """Frees what was compiled before it is too much: programs hold memory maps, and a process may have 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > 10_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def compiled_afresh():
    """Keeps what a test compiles out of the cache.

    Taken out of it, a step whose collectives run over several mesh axes may hang on simulated CPU devices.
    """
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, float("inf"))
    yield
    jax.config.update(option, before)


@pytest.fixture
def two_devices(monkeypatch):
    """Runs train on two devices: a step, and Orbax's saving, take a fraction of what eight simulated ones take."""
    _on_two_devices(monkeypatch)


@pytest.fixture(scope="module")
def two_devices_throughout():
    """The same for a whole file."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _on_two_devices(monkeypatch)
        yield


def _on_two_devices(monkeypatch):
    make_mesh = vir_jax.training.loop.make_mesh
    on_two = functools.partial(make_mesh, devices=jax.devices()[:2])
    monkeypatch.setattr(vir_jax.training.loop, "make_mesh", on_two)


@pytest.fixture
def kernels_run(monkeypatch):
    """All kernels run on this machine: compiled on what they are written for, interpreted elsewhere.

    But for those for CPUs, in C++, which nothing interprets.
    """
    for name, platform in kernels.PLATFORMS.items():
        if platform not in (platform_in_context(), "cpu"):
            module = importlib.import_module(f"vir_jax.ops.kernels.{name}")
            monkeypatch.setattr(module, "chunkwise", functools.partial(module.chunkwise, interpret=True))
            monkeypatch.setitem(kernels.PLATFORMS, name, platform_in_context())


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")


def _digits_config():
    """A run of 23 steps on digits with everything on that randomness or state can hide in."""
    config = default_config()
    config.epochs, config.optim.warmup_epochs, config.optim.cooldown_epochs = 0.9, 0.1, 0.1
    config.batch_size = config.eval_batch_size = 64
    config.accumulation_steps = 2
    config.label_smoothing, config.ema_decay = 0.1, 0.9
    config.model.name, config.model.image_size, config.model.dtype = "vir_pico4", (8, 8), "float32"
    config.model.layer_scale, config.model.drop_path_rate = 1e-5, 0.2
    config.data.dataset, config.data.eval_split, config.data.threads = "digits", "test", 2
    config.augment.crop, config.augment.crop_padding = "pad", 1
    config.augment.hflip, config.augment.randaugment_ops, config.augment.erase = 0.5, 2, 0.25
    config.mixing.mixup_alpha, config.mixing.cutmix_alpha = 0.8, 1.0
    config.optim.name, config.optim.lr, config.optim.final_lr = "adamw", 1e-3, 5e-6
    config.optim.weight_decay, config.optim.clip_norm = 0.05, 5.0
    config.log_every, config.checkpoint_every = 4, 5
    return config


@pytest.fixture
def digits_config():
    return _digits_config()


@pytest.fixture(scope="session")
def make_digits_config():
    """For fixtures that outlive a test."""
    return _digits_config
