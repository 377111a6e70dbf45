"""What is an image in a folder, what is nothing, and what is counted as left out."""

import logging
import os
import socket
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vir_jax.data import open_source
from vir_jax.data.walk import EXTENSIONS, describe, find_images


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path, "PNG")


def found(folder: Path) -> tuple[list[str], dict[str, int]]:
    left_out: Counter[str] = Counter()
    return [str(Path(path).relative_to(folder)) for path in find_images(folder, left_out)], dict(left_out)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="absl")
    return caplog


@pytest.mark.parametrize("extension", [*EXTENSIONS, ".JPG", ".Jfif", ".AVIF"])
def test_extensions(tmp_path: Path, extension: str):
    image(tmp_path / f"a{extension}")
    assert found(tmp_path) == ([f"a{extension}"], {})


def test_order_is_by_name_folder_by_folder(tmp_path: Path):
    for name in ("b/2.png", "b/10.png", "a.png", "b.png", "c/d/e/1.png", "b-1/1.png"):
        image(tmp_path / name)
    assert found(tmp_path)[0] == ["a.png", "b/10.png", "b/2.png", "b-1/1.png", "b.png", "c/d/e/1.png"]


def test_names_that_begin_with_a_dot_are_nothing(tmp_path: Path):
    """Twins that a Mac leaves behind, on any other file system and in archives."""
    for name in ("a.png", "._a.png", ".hidden.png", ".folder/b.png", "__MACOSX/a.png", "c/__MACOSX/._a.png"):
        image(tmp_path / name)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert found(tmp_path) == (["a.png"], {})


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path):
    image(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "notes.txt", "README", "d.jpg.part"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "absent.jpg")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    images, left_out = found(tmp_path)
    assert images == ["a.png"]
    assert left_out == {
        ".heic files": 2,
        ".txt files": 1,
        "files without an extension": 1,
        ".part files": 1,
        "pipes, sockets or devices": 2,
        "broken links": 2,
    }
    assert describe(Counter(left_out)).startswith(".heic files: 2, ")


def test_links_are_followed_but_in_no_circle(tmp_path: Path):
    image(tmp_path / "elsewhere/far.png")
    image(tmp_path / "split/cat/near.png")
    cat = tmp_path / "split/cat"
    (cat / "file.png").symlink_to(tmp_path / "elsewhere/far.png")
    (cat / "more").symlink_to(tmp_path / "elsewhere")
    (cat / "same").symlink_to(tmp_path / "elsewhere")
    (cat / "itself").symlink_to(cat)
    (cat / "up").symlink_to(tmp_path / "split")
    (cat / "relative").symlink_to("../..")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path)
    assert found(cat) == (
        ["file.png", "more/far.png", "near.png"],
        {"links to a folder above or read already": 5},
    )


def test_a_linked_class_and_split(tmp_path: Path):
    image(tmp_path / "pictures/1.png")
    (tmp_path / "real").mkdir()
    (tmp_path / "real/cat").symlink_to(tmp_path / "pictures")
    (tmp_path / "train").symlink_to(tmp_path / "real")
    (tmp_path / "real/all").symlink_to(tmp_path / "train")
    source = open_source("folder", "train", data_dir=str(tmp_path))
    assert source.class_names == ("cat",)
    assert [source.name(i) for i in range(len(source))] == [str(tmp_path / "train/cat/1.png")]


def test_classes_are_the_folders_that_hold_images(tmp_path: Path, log: pytest.LogCaptureFixture):
    for name in (
        "cat/1.png",
        "dog/deep/er/2.png",
        "dog/._2.png",
        "__MACOSX/cat/1.png",
        ".git/3.png",
        "loose.png",
    ):
        image(tmp_path / "train" / name)
    for name in ("empty", "notes", "cat/empty"):
        (tmp_path / "train" / name).mkdir()
    (tmp_path / "train/notes/a.txt").write_text("x")
    (tmp_path / "train/labels.csv").write_text("x")
    image(tmp_path / "val/dog/4.png")
    (tmp_path / "val/empty").mkdir()
    train = open_source("folder", "train", data_dir=str(tmp_path))
    assert train.class_names == ("cat", "dog")
    assert [Path(train.name(i)).name for i in range(len(train))] == ["1.png", "2.png"]
    (message,) = log.messages
    for part in (
        "left out in",
        "folders without images: 2",
        ".txt files: 1",
        ".csv files: 1",
        "images outside of the class folders: 1",
    ):
        assert part in message, message
    val = open_source("folder", "val", data_dir=str(tmp_path))
    assert val.class_names == ("dog",)  # Labels of two splits are compared by name.
    assert [val[i]["label"] for i in range(len(val))] == [0]


def test_a_clean_folder_needs_no_words(tmp_path: Path, log: pytest.LogCaptureFixture):
    image(tmp_path / "train/cat/1.png")
    open_source("folder", "train", data_dir=str(tmp_path))
    assert log.messages == []


def test_names_that_are_no_text(tmp_path: Path):
    folder = os.fsencode(tmp_path / "train") + b"/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        Image.new("RGB", (4, 3)).save(file, "PNG")
    source = open_source("folder", "train", data_dir=str(tmp_path))
    assert os.fsencode(source.name(0)) == folder + b"/\xff.png"
    assert source[0]["image"].startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_read_costs_no_class_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("cat/1.png", "dog/2.png"):
        image(tmp_path / "train" / name)
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found(tmp_path) == (["train/cat/1.png"], {"folders that cannot be read": 1})
    with pytest.raises(PermissionError, match=r"1 folders in or below .*train cannot be read"):
        open_source("folder", "train", data_dir=str(tmp_path))
