"""Files that are whole whenever the process is killed."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that a reader finds whole, in its old or its new version."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
