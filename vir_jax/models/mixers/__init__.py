"""Token mixers, one file each, by name. A file in this folder that registers a mixer is found by itself.

A mixer from elsewhere is there as soon as its module is imported.
"""

import importlib
import pkgutil

from vir_jax.models.mixers.mixer import Mixer, State, mixer_names, mixer_options, mixer_type, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Mixer", "State", "mixer_names", "mixer_options", "mixer_type", "register"]
