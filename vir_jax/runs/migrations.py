"""What stored configs of earlier versions say, in the fields of today's.

A run outlives the code that started it: its config was written when fields had other names, or did not exist yet.
Whoever changes `default_config` so that an older config would be misread adds to one of the tables below. A name that
has been used is never used again for something else, so that today's configs pass unchanged.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from vir_jax.runs.config import default_config, flatten, nearest

Fields = dict[str, Any]  # By dotted name.

RENAMED: dict[str, str] = {
    "model.drop_path": "model.drop_path_rate",
    "mixing.mixup": "mixing.mixup_alpha",
    "mixing.cutmix": "mixing.cutmix_alpha",
}
"""Fields by their former names -> their names today."""


def _remat_names_what_is_computed_anew(fields: Fields) -> None:
    """Name what is computed anew: `remat` was whether to keep a block's input alone."""
    if isinstance(fields.get("model.remat"), bool):
        fields["model.remat"] = "full" if fields["model.remat"] else "elementwise"


def _layer_scale_is_a_field(fields: Fields) -> None:
    """Set `layer_scale`, which the model's family used to decide."""
    if "model.name" in fields:
        fields.setdefault("model.layer_scale", 1e-5 if fields["model.name"].startswith("vir") else None)


def _image_size_has_one_spelling(fields: Fields) -> None:
    """Make a square its side; it could be (side,) and (side, side), too."""
    size = fields.get("model.image_size")
    if isinstance(size, list | tuple) and size[0] == size[-1]:
        fields["model.image_size"] = size[0]


def _readout_names_the_class_token(fields: Fields) -> None:
    """Name the class token, ViR's last and ViT's first."""
    place = "last" if fields.get("model.name", "").startswith("vir") else "first"
    if fields.get("model.readout") == place:
        fields["model.readout"] = "class_token"


def _size_mu_is_pico(fields: Fields) -> None:
    """Call 64 wide, 4 deep pico; mu is another size elsewhere."""
    if "model.name" in fields:
        fields["model.name"] = re.sub(r"^(vi[rt])_mu(?=\d)", r"\1_pico", fields["model.name"])


def _color_jitter_that_acts(fields: Fields) -> None:
    """Turn colour jitter off beside RandAugment, where it never did anything."""
    if fields.get("augment.randaugment_ops", 0) > 0 and "augment.color_jitter" in fields:
        fields["augment.color_jitter"] = 0.0


def _stem_is_the_familys(fields: Fields) -> None:
    """Leave the linear stem to the families that have it; it used to be the default."""
    linear = fields.get("model.stem") == "linear"
    if linear and fields.get("model.name", "").startswith(("vir_", "vit_")):
        fields["model.stem"] = None


CHANGED: tuple[Callable[[Fields], None], ...] = (
    _remat_names_what_is_computed_anew,
    _layer_scale_is_a_field,
    _image_size_has_one_spelling,
    _readout_names_the_class_token,
    _size_mu_is_pico,
    _color_jitter_that_acts,
    _stem_is_the_familys,
)
"""What values became, each applied in turn to the fields by today's names. On today's values they do nothing.

A field that is not stored and that none of them sets gets its default.
"""


def migrate(stored: Mapping[str, Any], *, where: str) -> ml_collections.ConfigDict:
    """Return a stored config of any version as one of today's: complete, typed and locked.

    Args:
      stored: what was written as JSON.
      where: it was found, for messages.

    Raises:
      ValueError: a field that no version knows, or one with a value of another type; it is named.
    """
    fields: Fields = {}
    for name, value in flatten(stored).items():
        today = RENAMED.get(name, name)
        if today in fields:
            raise ValueError(f"{where} has config.{today} twice, once under its former name")
        fields[today] = value
    for change in CHANGED:
        change(fields)

    config = default_config()
    known = flatten(json.loads(config.to_json()))
    for name, value in fields.items():
        if name not in known:
            raise ValueError(
                f"{where} has a field that this version does not know, config.{name} = {value!r}; the nearest is"
                f" config.{nearest(name, known)}. It was written by a later version, or by hand: use that version"
            )
        section, _, field = name.rpartition(".")
        try:
            (config[section] if section else config)[field] = value
        except TypeError as error:
            raise ValueError(f"{where} has config.{name} = {value!r}: {error}") from error
    return config
