"""The image files in a folder and below it, and a count of what else lies there."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Of what `decode_image` decodes; by its content, a file may have the extension of another format.
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".npy",
)  # fmt: skip

UNREADABLE = "folders that cannot be read"

# Folders that archives made on a Mac leave behind, full of twins of the images' names that are no images.
_NO_FOLDERS = ("__MACOSX",)

Folder = str | os.PathLike[str]


def find_images(folder: Folder, left_out: Counter[str]) -> Iterator[str]:
    """Yield the paths of the image files in and below a folder, sorted by name folder by folder.

    Images are regular files with one of `EXTENSIONS`. Links are followed, but for those to a folder that lies above
    or has been read, so that each folder is read once. Names that begin with a dot are nothing.

    Args:
      folder: where to look.
      left_out: to which what is neither image nor folder is added, counted by kind; folders that are `UNREADABLE`
        too.
    """
    read = set(map(_identity, _folders_above(folder)))
    read.add(_identity(folder))
    waiting = _entries(folder, left_out)
    while waiting:
        entry = waiting.pop()
        kind = _kind(entry)
        if kind != "folder":
            if kind is None:
                yield entry.path
            else:
                left_out[kind] += 1
        elif (identity := _identity(entry.path)) in read:
            left_out["links to a folder above or read already"] += 1
        else:
            read.add(identity)
            waiting += _entries(entry.path, left_out)


def find_folders(folder: Folder) -> tuple[str, ...]:
    """Return the sorted names of the folders in a folder, links to folders included, but none to one above."""
    above = {_identity(folder), *map(_identity, _folders_above(folder))}
    return tuple(
        entry.name
        for entry in reversed(_entries(folder, Counter()))
        if _kind(entry) == "folder" and _identity(entry.path) not in above
    )


def find_loose_files(folder: Folder) -> Counter[str]:
    """Return how many of each kind of file lie in a folder itself, and whether it is `UNREADABLE`."""
    found: Counter[str] = Counter()
    kinds = (_kind(entry) for entry in _entries(folder, found))
    found.update(kind or "images outside of the class folders" for kind in kinds if kind != "folder")
    return found


def describe(left_out: Counter[str]) -> str:
    """Return a count by kind as text, the most frequent first."""
    return ", ".join(f"{kind}: {count:,}" for kind, count in left_out.most_common())


def _folders_above(folder: Folder) -> set[Path]:
    """Return the folders that a folder lies in, by its path and by where links in that path lead."""
    absolute = Path(folder).absolute()
    return {*absolute.parents, *absolute.resolve().parents}


def _entries(folder: Folder, left_out: Counter[str]) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, the last name first."""
    try:
        with os.scandir(folder) as entries:
            named = [e for e in entries if not e.name.startswith(".") and e.name not in _NO_FOLDERS]
    except OSError:
        left_out[UNREADABLE] += 1
        return []
    return sorted(named, key=lambda entry: entry.name, reverse=True)


def _kind(entry: os.DirEntry[str]) -> str | None:
    """Return "folder", None for an image, or what else it is, in the plural."""
    try:
        # Without asking the file system again, for all but links.
        mode = stat.S_IFREG if entry.is_file(follow_symlinks=False) else entry.stat().st_mode
    except OSError:
        return "broken links"
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        return "pipes, sockets or devices"
    extension = os.path.splitext(entry.name)[1].lower()
    if extension in EXTENSIONS:
        return None
    return f"{extension} files" if extension else "files without an extension"


def _identity(folder: Folder) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
