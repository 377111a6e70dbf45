"""What a run asks of the place where its workdir lies, on a disk and in a bucket.

Paths are read alike on both (`exists`, `read_text`, `iterdir`); to write, remove and commit, `storage_of` gives the
place's own way. A disk has renames, `fsync` and appends; a bucket has objects that appear whole.
"""

import concurrent.futures
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import orbax.checkpoint as ocp
from absl import logging

from vir_jax.paths import BUCKET_SCHEME, check_path, scheme_of
from vir_jax.runs.bucket import BucketError, BucketPath

RunPath: TypeAlias = Path | BucketPath

_REMOVED = ".removed"
_COMMIT = "commit_success.txt"  # The object that Orbax writes last.


class Content(NamedTuple):
    """What a file holds."""

    bytes: int
    sha256: str


class Log(io.RawIOBase):
    """A file that grows. `write` returns how many bytes there was room for; `close` syncs."""

    def sync(self) -> None:
        """Return when readers find all that was written; raises OSError."""


@runtime_checkable
class Storage(Protocol):
    """How files are written where a workdir lies. Every method raises OSError where the place does not do it."""

    def write(self, path: RunPath, text: str) -> None:
        """Write a file that readers find whole, in its old or its new version."""

    def append(self, path: RunPath) -> Log:
        """Open a file, made if absent, to go on with."""

    def files(self, folder: RunPath) -> list[str]:
        """Return the names of all files in a folder and below, relative to it, sorted."""

    def measure(self, paths: Iterable[RunPath], *, sync: bool) -> list[Content]:
        """Read files; with `sync` once they are where a loss of power does not take them."""

    def pending(self, folder: RunPath) -> RunPath:
        """Return where Orbax keeps the files of a checkpoint until it is whole."""

    def committed(self, folder: RunPath) -> bool:
        """Return whether the checkpoint of that name is whole."""

    def leftover(self, path: RunPath) -> bool:
        """Return whether a folder beside the checkpoints is one that was not written, or not removed, to the end."""

    def retire(self, folder: RunPath) -> None:
        """Make a checkpoint vanish under its name at once; what is left of it is a `leftover`."""

    def remove(self, folder: RunPath) -> None:
        """Remove a leftover, as far as that can be done."""

    def set_aside(self, folder: RunPath, aside: RunPath) -> None:
        """Give a folder another name."""


def open_workdir(workdir: str | os.PathLike[str], name: str = "workdir") -> RunPath:
    """Return the path of a workdir, with `~` expanded and absolute.

    Raises:
      PathError: it is blank, or neither a local folder nor gs://bucket/folder; `name` says what was given.
    """
    path = check_path(workdir, name, bucket=True)
    return BucketPath(path) if scheme_of(path) == BUCKET_SCHEME else Path(path).absolute()


def storage_of(path: RunPath) -> Storage:
    """Return how files are written where the path lies."""
    return Bucket() if isinstance(path, BucketPath) else Disk()


class Disk:
    """A local or mounted file system."""

    def write(self, path: RunPath, text: str) -> None:
        """Write under a temporary name and rename."""
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def append(self, path: RunPath) -> Log:
        """Open the file unbuffered."""
        return _LogFile(path, "ab")

    def files(self, folder: RunPath) -> list[str]:
        """Return the files that a walk finds."""
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def measure(self, paths: Iterable[RunPath], *, sync: bool) -> list[Content]:
        """Read the files in blocks, several at once."""

        def measure(path: RunPath) -> Content:
            with _local(path).open("rb") as file:
                if sync:
                    os.fsync(file.fileno())  # Network file systems report here what they could not store.
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return Content(file.tell(), digest)

        with concurrent.futures.ThreadPoolExecutor() as pool:  # SHA-256 releases Python's global lock.
            return list(pool.map(measure, paths))

    def pending(self, folder: RunPath) -> RunPath:
        """Return the temporary name, that Orbax renames."""
        return folder.with_name(folder.name + ocp.utils.TMP_DIR_SUFFIX)

    def committed(self, folder: RunPath) -> bool:
        """Return whether it has its name."""
        return folder.is_dir()

    def leftover(self, path: RunPath) -> bool:
        """Return whether it has a temporary name."""
        return ocp.utils.TMP_DIR_SUFFIX in path.name or path.name.endswith(_REMOVED)

    def retire(self, folder: RunPath) -> None:
        """Rename it: a folder that is removed half must not look like a checkpoint."""
        folder.rename(folder.with_name(folder.name + _REMOVED))

    def remove(self, folder: RunPath) -> None:
        """Remove what can be removed."""
        shutil.rmtree(folder, ignore_errors=True)

    def set_aside(self, folder: RunPath, aside: RunPath) -> None:
        """Rename it."""
        folder.rename(aside)


class Bucket:
    """A bucket: what is whole when an object is written, and what when the last of several is."""

    def write(self, path: RunPath, text: str) -> None:
        """Write the object."""
        path.write_text(text)

    def append(self, path: RunPath) -> Log:
        """Keep the file in memory, and write it anew now and then."""
        return GrowingObject(_bucket(path))

    def files(self, folder: RunPath) -> list[str]:
        """Return the objects in the folder."""
        return _bucket(folder).files()

    def measure(self, paths: Iterable[RunPath], *, sync: bool) -> list[Content]:
        """Read the objects; each is where it will stay when its writing is done."""

        def measure(path: RunPath) -> Content:
            data = path.read_bytes()
            return Content(len(data), hashlib.sha256(data).hexdigest())

        with concurrent.futures.ThreadPoolExecutor(4) as pool:  # Each holds an object in memory.
            return list(pool.map(measure, paths))

    def pending(self, folder: RunPath) -> RunPath:
        """Return the name itself: nothing is renamed."""
        return folder

    def committed(self, folder: RunPath) -> bool:
        """Return whether the object that is written last is there."""
        return (folder / _COMMIT).is_file()

    def leftover(self, path: RunPath) -> bool:
        """Return whether it has a checkpoint's name without being whole."""
        return path.name.isdigit() and not self.committed(path)

    def retire(self, folder: RunPath) -> None:
        """Remove the object that was written last first."""
        (folder / _COMMIT).unlink()

    def remove(self, folder: RunPath) -> None:
        """Remove what can be removed."""
        try:
            _bucket(folder).rmtree()
        except BucketError as error:
            logging.warning("left over: %s", error)

    def set_aside(self, folder: RunPath, aside: RunPath) -> None:
        """Copy the objects, the last one last, and remove the first ones."""
        names = self.files(folder)
        for name in sorted(names, key=lambda name: name == _COMMIT):
            (aside / name).write_bytes((folder / name).read_bytes())
        self.retire(folder)
        self.remove(folder)


class _LogFile(io.FileIO, Log):
    """A file that is open to append; what was written is there, so that there is nothing to sync."""


class GrowingObject(Log):
    """An object that is written anew, longer, every `INTERVAL` seconds and on `sync` and `close`.

    It is replaced only as long as it is what this writer made of it: where another run has taken the workdir, the
    bytes of this one do not come over the other's. Until it can be written, bytes wait in memory.
    """

    INTERVAL = 10.0  # A bucket takes one version of an object a second.

    def __init__(self, path: BucketPath) -> None:
        self.name = str(path)
        self._path = path
        found = path.read()
        self._generation = found.generation
        self._data = bytearray(found.data or b"")
        self._written = len(self._data)
        self._given_up: list[int] = []  # Lengths of versions whose writing was not waited for to its end.
        self._writing, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(
            target=self._sync_now_and_then, name=f"upload {path.name}", daemon=True
        )
        self._thread.start()

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        """Take bytes; there is always room."""
        self._data += data
        return len(data)

    def sync(self) -> None:
        """Write the object as it now is.

        Raises:
          BucketError: the bucket did not take it, or another has written the object.
        """
        with self._writing:
            data = bytes(self._data)
            if len(data) == self._written:
                return
            generation = self._replace(data, self._generation)
            if generation is None:
                found = self._path.read()
                if len(found.data or b"") in self._given_up and data.startswith(found.data or b""):
                    generation = self._replace(data, found.generation)  # What was given up came through.
            if generation is None:
                raise BucketError(f"{self._path} was written by another run: this one's lines are not")
            self._generation, self._written = generation, len(data)
            self._given_up.clear()

    def _replace(self, data: bytes, generation: bytes) -> bytes | None:
        try:
            return self._path.replace_if(data, generation)
        except BucketError:
            self._given_up.append(len(data))
            raise

    def close(self) -> None:
        """Write what waits, and stop.

        Raises:
          BucketError: as `sync`.
        """
        if self.closed:
            return
        self._closing.set()
        self._thread.join()
        try:
            self.sync()
        finally:
            super().close()

    def _sync_now_and_then(self) -> None:
        while not self._closing.wait(self.INTERVAL):
            try:
                self.sync()
            except OSError as error:
                logging.error("%s; %d bytes wait", error, len(self._data) - self._written)


def _local(path: RunPath) -> Path:
    assert isinstance(path, Path)
    return path


def _bucket(path: RunPath) -> BucketPath:
    assert isinstance(path, BucketPath)
    return path
