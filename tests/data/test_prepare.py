"""The command that prepares TFDS sets. TensorFlow, where it is needed, stays in a process of its own."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.data.helpers import png, write_tfds
from vir_jax.data import open_source, prepare
from vir_jax.data.prepare import PreparationError

WORDNET_IDS = ["n01440764", "n01443537", "n01484850"]  # classes 0, 1 and 2


# --- ImageNet's archives ---


def write_tar(path: Path, names: Sequence[str], folders: Sequence[str] = ()) -> None:
    with tarfile.open(path, "w") as tar:
        for name in folders:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())


def validation_names(count: int) -> list[str]:
    return [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, count + 1)]


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", [f"{i}.tar" for i in WORDNET_IDS])
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", validation_names(5))
    return tmp_path


def test_complete_archives_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ids = prepare.imagenet_validation_labels()
    assert len(ids) == prepare.IMAGENET_COUNTS["validation"] == 50_000
    assert len(set(ids)) == 1000
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", [f"{i}.tar" for i in sorted(set(ids))])
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", validation_names(500)[::-1])  # in any order
    monkeypatch.setitem(prepare.IMAGENET_COUNTS, "validation", 500)
    prepare.check_imagenet_archives(tmp_path, allow_partial=False)


def test_partial_archives_pass_only_if_allowed(archives: Path):
    prepare.check_imagenet_archives(archives, allow_partial=True)
    with pytest.raises(PreparationError, match=r"train.tar has 3 entries, expected 1,000: 997 missing"):
        prepare.check_imagenet_archives(archives, allow_partial=False)


@pytest.mark.parametrize("allow_partial", [True, False])
@pytest.mark.parametrize(
    ("names", "folders", "message"),
    [
        (validation_names(5), ["val"], r"not expected \(val/\)"),
        (validation_names(5), ["."], r"not expected \(./\)"),
        ([*validation_names(5), "._ILSVRC2012_val_00000001.JPEG"], [], r"not expected \(._ILSVRC"),
        (
            ["val/" + name for name in validation_names(5)],
            [],
            r"5 not expected \(val/ILSVRC2012_val_00000001",
        ),
        (validation_names(5)[1:], [], r"missing \(ILSVRC2012_val_00000001.JPEG"),
        (
            [*validation_names(5), "ILSVRC2012_val_00000002.JPEG"],
            [],
            r"1 more than once \(.*_00000002.JPEG\)",
        ),
    ],
)
def test_entries_that_would_shift_labels_are_refused(archives, names, folders, message, allow_partial: bool):
    if not allow_partial:
        ids = sorted(set(prepare.imagenet_validation_labels()))
        write_tar(archives / "ILSVRC2012_img_train.tar", [f"{i}.tar" for i in ids])
    write_tar(archives / "ILSVRC2012_img_val.tar", names, folders)
    with pytest.raises(PreparationError, match=message) as error:
        prepare.check_imagenet_archives(archives, allow_partial=allow_partial)
    assert "ILSVRC2012_img_val.tar" in str(error.value)


def test_unknown_classes_are_refused(archives: Path):
    write_tar(archives / "ILSVRC2012_img_train.tar", [f"{WORDNET_IDS[0]}.tar", "n99999999.tar"])
    with pytest.raises(PreparationError, match=r"1 not expected \(n99999999.tar\)"):
        prepare.check_imagenet_archives(archives, allow_partial=True)


def test_missing_archives_are_named(tmp_path: Path):
    with pytest.raises(PreparationError, match=r"ILSVRC2012_img_train.tar is missing: get it from"):
        prepare.check_imagenet_archives(tmp_path, allow_partial=True)


def test_file_names_imply_classes():
    assert prepare.imagenet_wordnet_id("n01440764_10026.JPEG") == "n01440764"
    # The first three of the published list.
    names = [prepare.imagenet_wordnet_id(name) for name in validation_names(3)]
    assert names == ["n01751748", "n09193705", "n02105855"]


# --- Checking what is prepared ---


def test_a_good_set_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    examples = [(png((i, 0, 0)), i % 2, str(i)) for i in range(600)]
    write_tfds(tmp_path, "tiny", {"train": examples, "test": examples[:3]})
    prepare.main(["--dataset=tiny", f"--data_dir={tmp_path}"])
    output = capsys.readouterr().out
    assert "tiny is there already" in output
    assert "tiny train: 600 examples, 500 of them checked" in output
    assert "tiny test: 3 examples, 3 of them checked" in output


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([(png((1, 2, 3)), 0, "a"), (b"no image", 1, "b")], r"tiny train\[1\] \(b\): UnidentifiedImageError"),
        ([(png((1, 2, 3)), 0, "a"), (png((1, 2, 3))[:40], 1, "b")], r"tiny train\[1\] \(b\): "),
    ],
)
def test_images_that_cannot_be_decoded_are_named(tmp_path: Path, examples, message: str):
    write_tfds(tmp_path, "tiny", {"train": examples})
    with pytest.raises(SystemExit, match=message):
        prepare.main(["--dataset=tiny", f"--data_dir={tmp_path}"])


def test_counts_are_checked(tmp_path: Path):
    folder = write_tfds(tmp_path, "tiny", {"train": [(png((1, 2, 3)), 0, "a")] * 5})
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('["5"]', '["6"]'))
    with pytest.raises(SystemExit, match="train: 5 records in the files, 6 in the metadata, expected 6"):
        prepare.main(["--dataset=tiny", f"--data_dir={tmp_path}"])


@pytest.mark.parametrize(
    ("split", "file_name", "label", "wrong"),
    [
        ("train", "n01443537_7.JPEG", 1, None),
        ("train", "n01443537_7.JPEG", 2, r"the label is 2 \(n01484850\), the file name says n01443537"),
        ("validation", "ILSVRC2012_val_00000001.JPEG", 65, None),
        ("validation", "ILSVRC2012_val_00000001.JPEG", 1, "the file name says n01751748"),
        ("test", "ILSVRC2012_test_00000001.JPEG", -1, None),
    ],
)
def test_imagenet_labels_are_checked(
    tmp_path: Path, split: str, file_name: str, label: int, wrong: str | None
):
    names = sorted(set(prepare.imagenet_validation_labels()))
    write_tfds(tmp_path, "imagenet2012", {split: [(png((1, 2, 3)), label, file_name)]}, class_names=names)
    if wrong:
        with pytest.raises(PreparationError, match=wrong):
            prepare.check("imagenet2012", str(tmp_path), allow_partial=True)
    else:
        assert prepare.check("imagenet2012", str(tmp_path), allow_partial=True) == {split: 1}
    with pytest.raises(PreparationError, match="1 records in the files, 1 in the metadata, expected "):
        prepare.check("imagenet2012", str(tmp_path), allow_partial=False)


# --- Errors before anything is done ---


def test_unknown_sets_are_named(tmp_path: Path):
    with pytest.raises(SystemExit, match="error: no data set 'cifarr10'"):
        prepare.main(["--dataset=cifarr10", f"--data_dir={tmp_path}"])


def test_conversions_that_make_no_sense_are_refused(tmp_path: Path):
    write_tfds(tmp_path / "new", "tiny", {"train": [(png((1, 2, 3)), 0, "a")]})
    write_tfds(tmp_path / "old", "tiny", {"train": [(png((1, 2, 3)), 0, "a")]}, file_format="tfrecord")
    with pytest.raises(PreparationError, match="holds array_record, not tfrecord"):
        prepare.convert("tiny", str(tmp_path / "new"), str(tmp_path / "newer"))
    with pytest.raises(PreparationError, match="needs --data_dir: a new folder"):
        prepare.convert("tiny", str(tmp_path / "old"), None)
    with pytest.raises(PreparationError, match="exists: remove it, or give another"):
        prepare.convert("tiny", str(tmp_path / "old"), str(tmp_path / "new"))


# --- Converting ---


def test_converting_tfrecord(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    splits = {
        "train": [(png((i, 0, 0)), i % 2, f"{i}.png") for i in range(10)],
        "test": [(png((0, i, 0)), 0, f"{i}.png") for i in range(4)],
    }
    write_tfds(tmp_path / "old", "tiny", splits, file_format="tfrecord")
    prepare.main(["--dataset=tiny", f"--convert_from={tmp_path}/old", f"--data_dir={tmp_path}/new"])
    assert "tiny train: 10 examples" in capsys.readouterr().out
    for split, examples in splits.items():
        source = open_source("tiny", split, data_dir=str(tmp_path / "new"))
        assert source.class_names == ("cat", "dog")
        stored = [(source[i]["image"], source[i]["label"], source.file_name(i)) for i in range(len(source))]
        assert stored == examples
    assert [path.name for path in (tmp_path / "new/tiny").iterdir()] == ["1.0.0"]


def test_an_interrupted_conversion_leaves_nothing_to_read(tmp_path: Path):
    folder = write_tfds(
        tmp_path / "old", "tiny", {"train": [(png((1, 2, 3)), 0, "a")] * 3}, file_format="tfrecord"
    )
    (file,) = folder.glob("*.tfrecord*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    arguments = ["--dataset=tiny", f"--convert_from={tmp_path}/old", f"--data_dir={tmp_path}/new"]
    with pytest.raises(SystemExit, match="ends in the middle of a record"):
        prepare.main(arguments)
    with pytest.raises(ValueError, match="no data set 'tiny'"):  # as if nothing were there
        open_source("tiny", "train", data_dir=str(tmp_path / "new"))
    file.write_bytes(whole)
    prepare.main(arguments)
    assert len(open_source("tiny", "train", data_dir=str(tmp_path / "new"))) == 3
