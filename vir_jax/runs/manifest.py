"""Whether a checkpoint's files are what was written: a digest of each, written before the checkpoint is finished.

Orbax makes a checkpoint appear all at once or not at all, but does not notice bytes that change afterwards; the
manifest does.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from vir_jax.runs.files import write_atomically

MANIFEST = "manifest.json"
# Orbax's own notes, which it goes on writing after the manifest. Nothing is restored from them.
_NOTES = ("_CHECKPOINT_METADATA", "commit_success.txt")


class DamagedCheckpointError(RuntimeError):
    """A checkpoint's files are not the ones that were written; the message names the first and says why."""


def write_manifest(folder: Path, *, step: int) -> None:
    """Writes size and SHA-256 of every file below `folder`, once each is on the disk.

    Args:
      folder: of a checkpoint that is complete but for its manifest.
      step: of the checkpoint, so that a folder under another name is noticed.

    Raises:
      OSError: a file cannot be read back, or did not get to the disk.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _NOTES)
    names = [path.relative_to(folder).as_posix() for path in paths]
    digests = _digests(paths, sync=True)
    sizes = [path.stat().st_size for path in paths]
    files = {
        name: {"bytes": size, "sha256": digest}
        for name, size, digest in zip(names, sizes, digests, strict=True)
    }
    write_atomically(folder / MANIFEST, json.dumps({"step": step, "files": files}, indent=1) + "\n")


def verify(folder: Path, *, step: int, items: Collection[str] | None = None) -> None:
    """Checks the files of a checkpoint against its manifest.

    Args:
      folder: of the checkpoint.
      step: that it should be of.
      items: folders inside to check; None: all.

    Raises:
      DamagedCheckpointError: naming the checkpoint, the file and what is wrong.
    """
    files = _read(folder, step)
    if items is not None:
        files = {name: file for name, file in files.items() if name.split("/")[0] in items}
    for name, (size, _) in files.items():
        if not (folder / name).is_file():
            raise _damaged(folder, f"{name} is missing")
        found = (folder / name).stat().st_size
        if found != size:
            raise _damaged(folder, f"{name} has {found:,} bytes, not the {size:,} that were written")
    try:
        digests = _digests([folder / name for name in files], sync=False)
    except OSError as error:
        raise _damaged(folder, str(error)) from error
    for (name, (_, written)), digest in zip(files.items(), digests, strict=True):
        if digest != written:
            raise _damaged(folder, f"{name} holds other bytes than were written (SHA-256)")


def written_items(folder: Path, *, step: int) -> set[str]:
    """The folders that a checkpoint had when it was written.

    Raises:
      DamagedCheckpointError: the manifest is gone or cannot be read.
    """
    return {name.split("/")[0] for name in _read(folder, step)}


def _read(folder: Path, step: int) -> dict[str, tuple[int, str]]:
    """Size and digest of each file."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        written = int(manifest["step"])
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
    except FileNotFoundError as error:
        raise _damaged(folder, f"{MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if written != step:
        raise _damaged(folder, f"it holds step {written}, not {step}")
    return files


def _damaged(folder: Path, damage: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"the checkpoint {folder} is damaged: {damage}")


def _digests(paths: Iterable[Path], *, sync: bool) -> list[str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            if sync:
                os.fsync(file.fileno())  # Network file systems report here what they could not store.
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor() as pool:  # SHA-256 releases Python's global lock.
        return list(pool.map(digest, paths))
