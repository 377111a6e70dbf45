"""What is learned: one file a task, one contract (`Task`), found by its name.

`config.task` names a module of this package that defines a task, or any class as "package.module:Class".
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence

from vir_jax.extras import require

require("train", "ml_collections", "optax")

import ml_collections

from vir_jax.imports import load_object
from vir_jax.tasks.task import Task

__all__ = ["Task", "check_fields", "find_task", "known_tasks", "make_task"]


def make_task(config: ml_collections.ConfigDict, class_names: Sequence[str]) -> Task:
    """Return the task of a run's config.

    Args:
      config: see `default_config`.
      class_names: of the labels in the data, in their order.

    Raises:
      ValueError: no such task, or a config that it cannot use.
    """
    return find_task(config.task)(config, class_names)


def check_fields(config: ml_collections.ConfigDict) -> None:
    """Check that a config's task exists and uses what is switched on for tasks; `validate` does.

    Raises:
      ValueError: no such task, or a field that only others use is on.
    """
    used = find_task(config.task).fields
    others = {field for other in known_tasks().values() for field in other.fields}
    for field in sorted(others - set(used)):
        value = functools.reduce(lambda section, name: section[name], field.split("."), config)
        if value:
            raise ValueError(
                f"config.{field} is {value!r}, which the task {config.task!r} does not use; expected 0 (off)"
            )


def find_task(name: str) -> type[Task]:
    """Return the class of a task.

    Args:
      name: of a module in `vir_jax.tasks`, or "package.module:Class".

    Raises:
      ValueError: there is none of that name, or it is no task; the known ones are named.
    """
    if ":" not in name:
        tasks = known_tasks()
        if name not in tasks:
            raise ValueError(
                f"config.task is {name!r}; expected one of {sorted(tasks)}, or a class of your own as"
                " 'package.module:Class'"
            )
        return tasks[name]
    found = load_object(name, "config.task")
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise ValueError(f"config.task is {name!r}, which is no subclass of vir_jax.tasks.Task")
    missing = [*sorted(found.__abstractmethods__)]
    missing += [attribute for attribute in ("best", "higher_is_better") if not hasattr(found, attribute)]
    if missing:
        raise ValueError(f"config.task is {name!r}, which does not define {', '.join(missing)}")
    return found


@functools.cache
def known_tasks() -> Mapping[str, type[Task]]:
    """Return the tasks that modules of this package define, by the module's name.

    Raises:
      ValueError: a module that defines several.
    """
    tasks = {}
    for module in pkgutil.iter_modules(__path__):
        defined = [
            value
            for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values()
            if inspect.isclass(value)
            and issubclass(value, Task)
            and not inspect.isabstract(value)
            and value.__module__ == f"{__name__}.{module.name}"
        ]
        if len(defined) > 1:
            raise ValueError(f"{__name__}.{module.name} defines {len(defined)} tasks; expected one a file")
        if defined:
            tasks[module.name] = defined[0]
    return tasks
