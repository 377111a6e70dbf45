"""What may be given as a path: a local file or folder, and for a run's own folder a bucket of Google Cloud Storage.

Anything else is refused by name before it is used. `pathlib` would make a local folder `gs:` of "gs://bucket/run", and
the current folder of an empty text, without a word.
"""

import os
import re
from pathlib import Path
from typing import Any

from absl import flags

# A flag defined by a function of this module is its caller's.
flags.disclaim_key_flags()

BUCKET_SCHEME = "gs"
# A scheme is written with a slash after its colon, or is one of those that are known and forgotten slashes of.
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):/")
_BARE_SCHEME = re.compile(
    r"\s*(gs|gcs|s3|s3a|az|abfs|abfss|hdfs|file|https?|ftp|hf|cns|dbfs):", re.IGNORECASE
)
# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_MOUNT = (
    "mount the bucket (gcsfuse --implicit-dirs BUCKET FOLDER) or copy what is needed (gcloud storage cp -r), and name"
    " the local folder"
)


class PathError(ValueError):
    """A path that cannot be used; the message says what was given, what is expected, and what to do."""


def check_path(path: str | os.PathLike[str], name: str, *, bucket: bool = False) -> str:
    """Return a path with `~` expanded.

    Args:
      path: what was given.
      name: of the flag, field or argument that it was given for.
      bucket: whether it may lie in a bucket, as gs://bucket/folder.

    Raises:
      PathError: it is blank, has a scheme that is not read here, or a home that nobody has.
    """
    text = os.fspath(path)
    if not text.strip():
        raise PathError(
            f"{name} is empty ({text!r}): expected a folder{' or gs://bucket/folder' if bucket else ''}. A variable of"
            " the shell that is not set? The current folder is '.'"
        )
    scheme = scheme_of(text)
    if scheme == BUCKET_SCHEME and text.startswith(f"{BUCKET_SCHEME}://"):
        if not bucket:
            raise PathError(f"{name} is {text!r}, which is not read from a bucket: {_MOUNT}")
        return _check_bucket(text, name)
    if scheme is not None:
        raise PathError(f"{name} is {text!r}: {_advice(scheme, bucket=bucket)}")
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:  # What pathlib raises for ~nobody.
        raise PathError(f"{name} is {text!r}: {error}") from error


def scheme_of(path: str | os.PathLike[str]) -> str | None:
    """Return the scheme of what looks like a URL, in lower case; None for a local path."""
    text = os.fspath(path)
    found = _SCHEME.match(text) or _BARE_SCHEME.match(text)
    if found is not None:
        return found[1].lower()
    head, separator, _ = text.partition("://")  # $PWD/$BUCKET, for one.
    return re.split("[/ ]", head)[-1].lower() if separator else None


def _check_bucket(text: str, name: str) -> str:
    bucket, _, folder = text.removeprefix(f"{BUCKET_SCHEME}://").partition("/")
    parts = folder.rstrip("/").split("/")
    if not _BUCKET_NAME.fullmatch(bucket):
        raise PathError(f"{name} is {text!r}: {bucket!r} is no name of a bucket; expected gs://bucket/folder")
    if parts == [""]:
        raise PathError(f"{name} is {text!r}: expected a folder in the bucket, such as gs://{bucket}/run")
    wrong = [part for part in parts if part in ("", ".", "..") or re.search(r"[?#*\[\]\x00-\x1f]", part)]
    if wrong:
        raise PathError(
            f"{name} is {text!r}: {wrong[0]!r} cannot be a part of a path in a bucket (empty, '.', '..', or one of"
            " ? # * [ ] in it)"
        )
    return f"{BUCKET_SCHEME}://{bucket}/{'/'.join(parts)}"


def _advice(scheme: str, *, bucket: bool) -> str:
    if scheme in (BUCKET_SCHEME, "gcs") and bucket:
        return (
            "a bucket is written gs://bucket/folder, in lower case and as a text (pathlib.Path drops a slash)"
        )
    if scheme in (BUCKET_SCHEME, "gcs"):
        return f"it is not read from a bucket: {_MOUNT}"
    if scheme == "file":
        return "write the local path itself, without file:"
    known = "a local folder or gs://bucket/folder" if bucket else "a local path"
    return f"{scheme}: is not read here; expected {known}. Copy or mount it, and name the local folder"


def check_paths(config: Any) -> None:
    """Check the paths that a run's config holds.

    Raises:
      PathError: one of them cannot be used. `data.data_dir` may be None; a blank `init_from` is none.
    """
    if config.data.data_dir is not None:
        check_path(config.data.data_dir, "config.data.data_dir")
    if config.init_from != "":
        check_path(config.init_from, "config.init_from", bucket=True)


def define_path(
    name: str, default: str | None, help: str, *, bucket: bool = False, required: bool = False
) -> flags.FlagHolder[Any]:
    """Define a flag that holds a path, with `~` expanded; a path that cannot be used is a mistake of usage."""
    return flags.DEFINE(_PathParser(name, bucket), name, default, help, required=required)


class _PathParser(flags.ArgumentParser[str]):
    """Parse a flag by `check_path`."""

    syntactic_help = "a path"

    def __init__(self, name: str, bucket: bool) -> None:
        self._name, self._bucket = name, bucket

    def parse(self, argument: str) -> str:
        """Return the path as it is to be used."""
        return check_path(argument, f"--{self._name}", bucket=self._bucket)

    def flag_type(self) -> str:
        """Return what the help calls the flag's type."""
        return "path"
