"""The config that a workdir belongs to, and what may change when its run goes on."""

import json
from typing import Any

import ml_collections
from absl import logging

from vir_jax.parallel.processes import check_equal, decided_by_process_0
from vir_jax.runs.migrations import flatten, migrate
from vir_jax.runs.storage import RunPath, storage_of

CONFIG_FILE = "config.json"

# Fields that change neither the model, nor the data order, nor an update but by rounding: free to change on resume.
FREE_FIELDS = (
    "log_every",
    "eval_every",
    "eval_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
    "writers",
    "sample_images",
    "profile",
    "data.crop_fraction",
    "data.data_dir",
    "data.eval_split",
    "data.threads",
    "data.max_corrupt_fraction",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "model.implementation",
    "model.mode",
    "model.remat",
)
# Of these, what each host may have its own of.
HOST_FIELDS = ("data.data_dir", "data.threads")
# Changed on purpose (a longer run, a gentler one) these change updates from here on: allowed, but said loudly.
TUNING_FIELDS = (
    "epochs",
    "max_skipped_steps",
    "data.background",
    "optim.cooldown_epochs",
    "optim.lr",
    "optim.final_lr",
    "optim.clip_norm",
)


def check_config(workdir: RunPath, config: ml_collections.ConfigDict) -> bool:
    """Check a config against that of the run that the workdir holds, if it holds one. Every process must call it.

    Returns:
      Whether the workdir says what config its run has.

    Raises:
      ValueError: the run there has another model, data or optimisation; every difference is named. Or its
        config cannot be read. Or the processes of this run have different configs.
    """
    fields = flatten(json.loads(config.to_json()))
    check_equal({f"config.{name}": value for name, value in fields.items() if name not in HOST_FIELDS})
    return decided_by_process_0(lambda: _check_config(workdir, config), ValueError)


def _check_config(workdir: RunPath, config: ml_collections.ConfigDict) -> bool:
    path = workdir / CONFIG_FILE
    if not path.exists():
        return False
    try:
        old = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove it: the config is then compared with the newest checkpoint's."
        ) from error
    check_resumable(workdir, migrate(old, where=str(path)), config)
    return True


def check_resumable(workdir: RunPath, old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> None:
    """Check that a run with the config `old`, as `migrate` returns it, can go on with `new`; see `check_config`."""
    # Migrated as well, so that a value with several spellings has the same one on both sides.
    new = migrate(json.loads(new.to_json()), where="this start's config")
    differences = compare(json.loads(old.to_json()), json.loads(new.to_json()))
    refused = [name for name in differences if name not in FREE_FIELDS + TUNING_FIELDS]
    if refused:
        lines = "\n".join(f"  {name}: {differences[name]}" for name in refused)
        raise ValueError(
            f"{workdir} holds a run with another config:\n{lines}\n"
            "Give these fields their old values to go on with that run, or choose another workdir."
        )
    for name, change in differences.items():
        level = logging.WARNING if name in TUNING_FIELDS else logging.INFO
        logging.log(level, "config.%s changed on resume: %s", name, change)


def write_config(workdir: RunPath, config: ml_collections.ConfigDict) -> None:
    """Make the workdir this run's, once nothing stands in the way of its first step. Every process must call it."""

    def write() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        storage_of(workdir).write(workdir / CONFIG_FILE, config.to_json(indent=2) + "\n")

    decided_by_process_0(write)


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Return the dotted names of all fields that differ, with `old -> new`."""
    before, after = flatten(old), flatten(new)
    missing = "(absent)"
    return {
        name: f"{before.get(name, missing)!r} -> {after.get(name, missing)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, missing) != after.get(name, missing)
    }
