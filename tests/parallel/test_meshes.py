"""The same run on any mesh: losses, parameters, checkpoints."""

import chex
import jax
import numpy as np
import pytest

from vir_jax.data import AugmentConfig, open_source, train_loader
from vir_jax.parallel.mesh import local_rows, make_mesh, put_batch
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.tasks import make_task
from vir_jax.training.plan import make_plan

pytestmark = pytest.mark.usefixtures("compiled_afresh")
SIZES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2), "2x2": (2, 2, 1)}


class Run:
    """A run that is stepped by hand."""

    def __init__(self, config, sizes):
        self.mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        self.config = config
        self.source = open_source("digits", "train")
        self.plan = make_plan(
            config,
            self.mesh,
            task=make_task(config, self.source.class_names),
            steps_per_epoch=len(self.source) / config.batch_size,
        )
        self.compiled = self.plan.compile()
        self.state = self.plan.init(jax.random.key(config.seed))
        self.batches = train_loader(
            self.source,
            batch_size=config.batch_size,
            image_size=self.plan.image_size,
            augment=AugmentConfig(**config.augment, mean=config.data.mean, std=config.data.std),
            seed=config.seed,
            rows=local_rows(self.mesh, config.batch_size),
            num_threads=2,
        )

    def losses(self, steps):
        losses = []
        for _ in range(steps):
            batch = put_batch(next(self.batches), self.mesh, self.config.batch_size)
            self.state, metrics = self.compiled(self.state, batch)
            losses.append(float(metrics["loss"]))
        self.batches.close()
        return losses

    def save(self, workdir):
        with Checkpoints(workdir) as checkpoints:
            progress = {"data": self.batches.get_state().decode()}
            checkpoints.save(self.state, progress=progress, config=self.config, metadata={})

    def restore(self, workdir):
        with CheckpointReader(workdir) as checkpoints:
            self.state, progress = checkpoints.restore(self.plan.state, checkpoints.resolve("last"))
        self.batches.set_state(progress["data"].encode())


def relative_rms(tree, reference):
    errors = jax.tree.map(
        lambda x, y: np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(y)),
        tree,
        reference,
    )
    return max(jax.tree.leaves(errors))


@pytest.fixture(scope="module")
def runs():
    made = {}

    def get(config, name):
        if name not in made:
            made[name] = Run(config, SIZES[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def reference():
    return {}


@pytest.mark.parametrize("name", ["data", "fsdp", "all"])
def test_twenty_steps_are_the_same_on_every_mesh(digits_config, reference, name):
    if not reference:
        one = Run(digits_config, SIZES["one"])
        reference["losses"], reference["params"] = one.losses(20), jax.tree.map(np.asarray, one.state.params)
    run = Run(digits_config, SIZES[name])
    np.testing.assert_allclose(run.losses(20), reference["losses"], rtol=1e-5)
    assert relative_rms(run.state.params, reference["params"]) < 1e-4


@pytest.mark.parametrize(("written", "read"), [("2x2", "one"), ("one", "2x2")])
def test_a_checkpoint_goes_on_on_another_mesh(tmp_path, digits_config, runs, written, read):
    writer, reader = runs(digits_config, written), runs(digits_config, read)
    writer.losses(3)
    writer.save(tmp_path)
    reader.restore(tmp_path)
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, reader.state), jax.tree.map(np.asarray, writer.state)
    )
    assert reader.state.params["stage"]["blocks"]["mlp"]["up"]["kernel"].sharding.mesh == reader.mesh
    np.testing.assert_allclose(reader.losses(1), writer.losses(1), rtol=1e-5)
    assert relative_rms(reader.state.params, writer.state.params) < 1e-5
