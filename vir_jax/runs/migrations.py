"""From the config of an earlier version to today's: what fields were called, and what their values meant."""

import re
from collections.abc import Callable
from typing import Any

from vir_jax.runs.config import flatten

RENAMES: dict[str, str] = {
    "model.drop_path": "model.drop_path_rate",
    "mixing.mixup": "mixing.mixup_alpha",
    "mixing.cutmix": "mixing.cutmix_alpha",
}
"""Dotted names, old to new."""


def _remat_names_a_policy(config: dict[str, Any]) -> None:
    """`remat` was whether to keep a block's input alone."""
    if isinstance(config.get("model.remat"), bool):
        config["model.remat"] = "full" if config["model.remat"] else "elementwise"


def _layer_scale_is_a_field(config: dict[str, Any]) -> None:
    """The model's family used to decide."""
    if "model.name" in config:
        config.setdefault("model.layer_scale", 1e-5 if config["model.name"].startswith("vir") else None)


def _image_size_is_a_side_or_a_pair(config: dict[str, Any]) -> None:
    """A square given on the command line was (side,)."""
    size = config.get("model.image_size")
    if isinstance(size, list | tuple) and len(size) == 1:
        config["model.image_size"] = size[0]


def _readout_names_the_class_token(config: dict[str, Any]) -> None:
    """The class token is ViR's last and ViT's first."""
    class_token = "last" if config.get("model.name", "").startswith("vir") else "first"
    if config.get("model.readout") == class_token:
        config["model.readout"] = "class_token"


def _size_mu_is_pico(config: dict[str, Any]) -> None:
    """64 wide, 4 deep; mu is another size elsewhere."""
    if "model.name" in config:
        config["model.name"] = re.sub(r"^(vi[rt])_mu(?=\d)", r"\1_pico", config["model.name"])


def _color_jitter_that_acts(config: dict[str, Any]) -> None:
    """Beside RandAugment it never did."""
    if config.get("augment.randaugment_ops", 0) > 0 and "augment.color_jitter" in config:
        config["augment.color_jitter"] = 0.0


CHANGES: tuple[Callable[[dict[str, Any]], None], ...] = (
    _remat_names_a_policy,
    _layer_scale_is_a_field,
    _image_size_is_a_side_or_a_pair,
    _readout_names_the_class_token,
    _size_mu_is_pico,
    _color_jitter_that_acts,
)
"""What values became, each applied in turn to a config of today's dotted names. On today's values they do nothing."""


def migrate(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a stored config (nested, as JSON gives it) in today's names and values; fields it lacks are left out.

    Raises:
        ValueError: a field stands there under its old name and its new one.
    """
    flat: dict[str, Any] = {}
    for name, value in flatten(stored).items():
        today = RENAMES.get(name, name)
        if today in flat:
            raise ValueError(f"the stored config has {today!r} twice: also under its old name")
        flat[today] = value
    for change in CHANGES:
        change(flat)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, field = name.split(".")
        section = nested
        for key in sections:
            section = section.setdefault(key, {})
        section[field] = value
    return nested
