"""Whether a checkpoint's files are what was written: a digest of each, written before the checkpoint is finished.

Orbax makes a checkpoint appear all at once or not at all, but does not notice bytes that change afterwards; the
manifest does. Its writer reads the files back: what it lists is what arrived.
"""

import json
from collections.abc import Collection

from vir_jax.runs.bucket import BucketError
from vir_jax.runs.storage import Content, RunPath, storage_of

MANIFEST = "manifest.json"
# Orbax's own notes, which it goes on writing after the manifest. Nothing is restored from them.
_NOTES = ("_CHECKPOINT_METADATA", "commit_success.txt")


class DamagedCheckpointError(RuntimeError):
    """A checkpoint's files are not the ones that were written; the message names the first and says why."""


def write_manifest(folder: RunPath, *, step: int) -> None:
    """Write size and SHA-256 of every file below `folder`, once each is on the disk.

    Args:
      folder: of a checkpoint that is complete but for its manifest.
      step: of the checkpoint, so that a folder under another name is noticed.

    Raises:
      OSError: a file cannot be read back, or did not get to the disk.
    """
    storage = storage_of(folder)
    names = [name for name in storage.files(folder) if name.split("/")[-1] not in _NOTES]
    contents = storage.measure([folder / name for name in names], sync=True)
    files = {name: content._asdict() for name, content in zip(names, contents, strict=True)}
    storage.write(folder / MANIFEST, json.dumps({"step": step, "files": files}, indent=1) + "\n")


def verify(folder: RunPath, *, step: int, items: Collection[str] | None = None) -> None:
    """Check the files of a checkpoint against its manifest.

    Args:
      folder: of the checkpoint.
      step: that it should be of.
      items: folders inside to check; None: all.

    Raises:
      DamagedCheckpointError: naming the checkpoint, the file and what is wrong.
      BucketError: a bucket does not answer.
    """
    files = _read(folder, step)
    if items is not None:
        files = {name: file for name, file in files.items() if name.split("/")[0] in items}
    storage = storage_of(folder)
    missing = files.keys() - set(storage.files(folder))
    if missing:
        raise _damaged(folder, f"{min(missing)} is missing")
    try:
        contents = storage.measure([folder / name for name in files], sync=False)
    except BucketError:  # That a bucket does not answer says nothing of what it holds.
        raise
    except OSError as error:
        raise _damaged(folder, str(error)) from error
    for (name, written), found in zip(files.items(), contents, strict=True):
        if found.bytes != written.bytes:
            raise _damaged(
                folder, f"{name} has {found.bytes:,} bytes, not the {written.bytes:,} that were written"
            )
        if found.sha256 != written.sha256:
            raise _damaged(folder, f"{name} holds other bytes than were written (SHA-256)")


def written_items(folder: RunPath, *, step: int) -> set[str]:
    """Return the folders that a checkpoint had when it was written.

    Raises:
      DamagedCheckpointError: the manifest is gone or cannot be read.
    """
    return {name.split("/")[0] for name in _read(folder, step)}


def _read(folder: RunPath, step: int) -> dict[str, Content]:
    """Return what each file held."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        written = int(manifest["step"])
        files = {
            str(name): Content(int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()
        }
    except FileNotFoundError as error:
        raise _damaged(folder, f"{MANIFEST} is missing") from error
    except BucketError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if written != step:
        raise _damaged(folder, f"it holds step {written}, not {step}")
    return files


def _damaged(folder: RunPath, damage: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"the checkpoint {folder} is damaged: {damage}")
