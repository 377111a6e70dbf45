import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.config import default_config
from vir_jax.runs.metrics import MetricsWriter
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import create_train_state


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """What a run on digits leaves: a 2-D model whose every parameter matters, its moving average, and metrics."""
    config = default_config()
    config.eval_batch_size = 128
    config.model.name, config.model.image_size, config.model.dtype = "vir_pico2", (8, 8), "float32"
    config.model.retention, config.model.layer_scale = "2d", 1e-5
    config.data.dataset, config.data.eval_split, config.data.threads = "digits", "test", 2

    shapes = jax.eval_shape(model_functions(config.model, 10).init, jax.random.key(0))
    draw = np.random.default_rng(0).standard_normal
    raw, ema = (
        jax.tree.map(lambda x: jnp.asarray(0.2 * draw(x.shape), jnp.float32), shapes) for _ in range(2)
    )
    state = create_train_state(raw, optax.sgd(1.0), ema=True)
    state = state.__class__(step=state.step + 11, params=raw, opt_state=state.opt_state, ema=ema)

    folder = tmp_path_factory.mktemp("inspected") / "run"
    with Checkpoints(folder) as checkpoints:
        metadata = {"class_names": [str(digit) for digit in range(10)]}
        checkpoints.save(state, progress={}, config=config, metadata=metadata)
    with MetricsWriter(folder, start_step=0, total_steps=11) as writer:
        for step in (4, 8, 11):
            metrics = {"loss": 2.0 / step, "top1": step / 20, "learning_rate": 1e-3, "gradient_norm": 1.0}
            writer.write(step, {f"train/{name}": value for name, value in metrics.items()})
        writer.write(11, {"eval/loss": 0.3, "eval/top1": 0.4})
    return folder
