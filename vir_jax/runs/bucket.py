"""Paths in a bucket of Google Cloud Storage, read and written by TensorStore's own client.

Orbax takes paths of `etils.epath` and writes the arrays through TensorStore. Epath's own gs:// paths need TensorFlow or
gcsfs besides, with credentials and retries of their own; `BucketPath` has the arrays' client do the other files too, so
that a run needs no further package, and TensorFlow is not imported where it is installed.

What holds in a bucket and not on a disk: an object appears whole or not at all, can be created on the condition that
there is none or replaced on the condition that it still is what was read (its generation), and is seen by all at once.
What does not: there are no folders beside the names of objects, nothing is renamed, nothing is appended to.
"""

import concurrent.futures
import functools
import io
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorstore
from etils import epath
from etils.epath.gpath import PosixGPath

# Seconds that a request of a few kilobytes may take, the client's own retries included. Longer is an outage.
PATIENCE = 60.0
_DELETIONS = 16  # at a time


class BucketError(OSError):
    """The bucket did not do what was asked; the message says what was asked and what it answered."""


class Version(NamedTuple):
    """What an object was when it was read.

    Attributes:
      data: its bytes; None where there was none.
      generation: that `BucketPath.replace` compares with.
    """

    data: bytes | None
    generation: bytes


@epath.register_path_cls("gs://")
class BucketPath(PosixGPath):
    """A path gs://bucket/name: an object, or the folder of all objects whose names begin with name/."""

    # ---------------------------------------------------------------- reading

    def read(self, *, patience: float | None = PATIENCE) -> Version:
        """Return the object and its generation.

        Raises:
          BucketError: the bucket did not answer, or refused.
        """
        found = self._wait(self._store().read(self._key), "read", patience)
        return Version(found.value if found.state == "value" else None, found.stamp.generation)

    def read_bytes(self) -> bytes:
        """Return what the object holds.

        Raises:
          FileNotFoundError: there is none.
        """
        data = self.read(patience=None).data
        if data is None:
            raise FileNotFoundError(f"{self} does not exist")
        return data

    def read_text(self, encoding: str | None = None, errors: str = "strict") -> str:
        """Return what the object holds, as UTF-8."""
        return self.read_bytes().decode(errors=errors)

    def exists(self) -> bool:
        """Return whether there is such an object, or one in such a folder."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Return whether there is such an object."""
        return any(name == self._key for name in self._names(self._key, self._key + "\0"))

    def is_dir(self) -> bool:
        """Return whether there is an object in such a folder."""
        return bool(self._names_below())

    def files(self) -> list[str]:
        """Return the names of all objects in the folder and below, relative to it, sorted."""
        prefix = len(self._key) + 1
        return sorted(name[prefix:] for name in self._names_below())

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield what is in the folder; nothing where there is no such folder."""
        for name in sorted({name.split("/")[0] for name in self.files()}):
            yield self / name

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield what a pattern of one part matches in the folder."""
        for path in self.iterdir():
            if path.match(pattern):
                yield path

    def open(self, mode: str = "r", **options: Any) -> io.IOBase:
        """Open the object: what is written appears when the file is closed."""
        if mode in ("r", "rb"):
            data = self.read_bytes()
            return io.BytesIO(data) if mode == "rb" else io.StringIO(data.decode())
        if mode in ("w", "wb"):
            return _Upload(self) if mode == "wb" else io.TextIOWrapper(_Upload(self), "utf-8")
        raise ValueError(f"mode {mode!r} of {self}: an object is read or written whole")

    # ---------------------------------------------------------------- writing

    def replace_if(
        self, data: bytes | None, generation: bytes, *, patience: float = PATIENCE
    ) -> bytes | None:
        """Write the object, or with None remove it, if it still has the generation that `read` gave.

        Returns:
          The new generation; None where another wrote it meanwhile.

        Raises:
          BucketError: the bucket did not answer, or refused.
        """
        stamp = self._wait(self._store().write(self._key, data, if_equal=generation), "write", patience)
        if stamp.generation:
            return stamp.generation
        # A client that is not told of its success asks again, and is refused then: by what it wrote itself.
        now = self.read(patience=patience)
        return now.generation if now.data == data else None

    def write_bytes(self, data: bytes) -> int:
        """Write the object, whole or not at all."""
        self._wait(self._store().write(self._key, data), "write", None)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        """Write the object as UTF-8, whole or not at all."""
        return self.write_bytes(data.encode())

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there when there is an object in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        self._wait(self._store().write(self._key, None), "remove", PATIENCE)

    def rmtree(self, missing_ok: bool = False) -> None:
        """Remove all objects in the folder and below, in no order."""
        with concurrent.futures.ThreadPoolExecutor(_DELETIONS) as pool:
            for _ in pool.map(lambda name: (self / name).unlink(), self.files()):
                pass

    def resolve(self, strict: bool = False) -> "BucketPath":
        """Return the path itself: there is nothing that it could be relative to."""
        return self

    def absolute(self) -> "BucketPath":
        """Return the path itself."""
        return self

    # ---------------------------------------------------------------- the client

    @property
    def _bucket(self) -> str:
        return os.fspath(self).removeprefix("gs://").partition("/")[0]

    @property
    def _key(self) -> str:
        return os.fspath(self).removeprefix("gs://").partition("/")[2]

    def _store(self) -> tensorstore.KvStore:
        return _open(self._bucket)

    def _names_below(self) -> list[str]:
        return self._names(f"{self._key}/", f"{self._key}0")  # "0" comes after "/".

    def _names(self, first: str, end: str) -> list[str]:
        names = self._wait(self._store().list(tensorstore.KvStore.KeyRange(first, end)), "list", PATIENCE)
        return [name.decode() for name in names]

    def _wait(self, future: Any, asked: str, patience: float | None) -> Any:
        try:
            return future.result(timeout=patience)
        except TimeoutError as error:
            raise BucketError(f"cannot {asked} {self}: no answer within {patience:.0f} s") from error
        except (ValueError, RuntimeError, OSError) as error:
            raise BucketError(f"cannot {asked} {self}: {_explain(str(error))}") from error


class _Upload(io.BytesIO):
    """What is written to an object when it is closed without an error."""

    def __init__(self, path: BucketPath) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            self._path.write_bytes(self.getvalue())
        super().close()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self.close()
        else:
            super().close()


@functools.cache
def _open(bucket: str) -> tensorstore.KvStore:
    return tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket}).result()


def _explain(answer: str) -> str:
    """Return the first line of TensorStore's message, and what is to be done."""
    hints = {
        "NOT_FOUND": "there is no such bucket, or it is not to be seen with these credentials",
        "PERMISSION_DENIED": "the account may not do that; it needs roles/storage.objectUser on the bucket",
        "UNAUTHENTICATED": "no credentials; run `gcloud auth application-default login`, or give the VM's service"
        " account access",
    }
    hint = next((f" ({hint})" for code, hint in hints.items() if answer.startswith(code)), "")
    return answer.split(" [")[0].splitlines()[0] + hint
