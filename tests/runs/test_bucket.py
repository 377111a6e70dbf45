import functools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from vir_jax.runs import lease, storage
from vir_jax.runs.bucket import BucketError, BucketPath
from vir_jax.runs.lock import WorkdirInUseError, exclusive
from vir_jax.runs.metrics import MetricsWriter, read_metrics
from vir_jax.runs.storage import Bucket, Disk, GrowingObject, open_workdir, storage_of


@pytest.fixture(autouse=True)
def short_lease(monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 0.5)


# --- Objects ---


def test_an_object_is_created_and_replaced_by_one(folder):
    path = folder / "x"
    absent = path.read()
    assert absent.data is None
    first = path.replace_if(b"1", absent.generation)
    assert first
    assert path.replace_if(b"2", absent.generation) is None  # Created by another meanwhile.
    second = path.replace_if(b"3", first)
    assert second not in (None, first)
    assert path.replace_if(b"4", first) is None
    assert path.replace_if(None, first) is None
    assert path.read() == (b"3", second)
    path.replace_if(None, second)
    assert path.read().data is None


def test_a_write_whose_answer_was_lost_is_recognised(folder):
    path = folder / "x"
    absent = path.read()
    path.write_bytes(b"mine")  # Came through, and the client asks again.
    assert path.replace_if(b"mine", absent.generation) == path.read().generation


def test_a_folder_is_the_names_below_it(folder):
    (folder / "a" / "b.json").write_text("ä")
    (folder / "ab").write_bytes(b"")
    (folder / "c").write_bytes(b"1")
    assert (folder / "a" / "b.json").read_text() == "ä"
    assert folder.files() == ["a/b.json", "ab", "c"]
    assert [path.name for path in folder.iterdir()] == ["a", "ab", "c"]
    assert [path.name for path in folder.glob("a*")] == ["a", "ab"]
    assert (folder / "a").is_dir()
    assert not (folder / "a").is_file()
    assert (folder / "ab").is_file()
    assert not (folder / "ab").is_dir()
    assert not (folder / "b").exists()
    (folder / "a").rmtree()
    assert folder.files() == ["ab", "c"]
    with pytest.raises(FileNotFoundError, match=r"a/b\.json does not exist"):
        (folder / "a" / "b.json").read_text()


def test_what_is_opened_appears_when_it_is_closed(folder):
    def write(text):
        with (folder / "x").open("wb") as file:
            file.write(b"half")
            file.write(text)

    with pytest.raises(TypeError):
        write("no bytes")
    assert not (folder / "x").exists()
    with (folder / "x").open("w") as file:
        file.write("whole")
        assert not (folder / "x").exists()
    with (folder / "x").open() as file:
        assert file.read() == "whole"


def test_a_bucket_says_what_it_does_not_do(bucket, folder):
    with pytest.raises(
        BucketError, match=r"cannot write gs://no-bucket/x: NOT_FOUND.*there is no such bucket"
    ):
        BucketPath("gs://no-bucket/x").write_text("")
    bucket.refuse = lambda method, name: True
    with pytest.raises(BucketError, match=r"cannot read .*PERMISSION_DENIED.*needs roles/storage.objectUser"):
        (folder / "x").read()
    with pytest.raises(BucketError, match="cannot list"):
        folder.files()


def test_a_bucket_that_does_not_answer(bucket, folder):
    def wait(method, name):
        time.sleep(1)
        return True

    bucket.refuse = wait
    with pytest.raises(BucketError, match="no answer within 0 s"):
        (folder / "x").read(patience=0.1)


# --- The same on a disk and in a bucket ---


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    return tmp_path / "run" if request.param == "disk" else request.getfixturevalue("folder")


def test_storage_of(place):
    kind = storage_of(place)
    assert isinstance(kind, Bucket if str(place).startswith("gs://") else Disk)
    (place / "checkpoints" / "7").mkdir(parents=True)
    (place / "checkpoints" / "7" / "x").write_bytes(b"12")
    (place / "checkpoints" / "7" / "commit_success.txt").write_text("")
    step = place / "checkpoints" / "7"
    kind.write(place / "config.json", "{}")
    kind.write(place / "config.json", "[]")
    assert (place / "config.json").read_text() == "[]"
    assert kind.files(step) == ["commit_success.txt", "x"]
    sha = "6b51d431df5d7f141cbececcf79edf3dd861c3b4069f0b11661a3eefacbba918"
    assert kind.measure([step / "x"], sync=True) == [(2, sha)]
    assert kind.committed(step)
    assert not kind.leftover(step)
    aside = step.with_name("7.damaged1")
    kind.set_aside(step, aside)
    assert not kind.committed(step)
    assert not step.exists()
    assert kind.files(aside) == ["commit_success.txt", "x"]
    assert not kind.leftover(aside)
    kind.set_aside(aside, step)
    kind.retire(step)
    assert not kind.committed(step)
    (left,) = [path for path in (place / "checkpoints").iterdir() if kind.leftover(path)]
    kind.remove(left)
    assert list((place / "checkpoints").iterdir() if (place / "checkpoints").exists() else []) == []


def test_metrics(place, tmp_path):
    place.mkdir(exist_ok=True)
    for start, values in ((0, (1.0, 2.0, 3.0)), (2, (30.0, 40.0))):
        with MetricsWriter(place, start_step=start, total_steps=4) as writer:
            for step, value in enumerate(values, start=start + 1):
                writer.write(step, {"train/loss": value})
            writer.sync()
            assert read_metrics(place)[-1]["train/loss"] == values[-1]
    assert [(line["step"], line["train/loss"]) for line in read_metrics(place)] == [
        (1, 1),
        (2, 2),
        (3, 30),
        (4, 40),
    ]
    scalars = []
    for number, path in enumerate(sorted((place / "tensorboard").iterdir())):
        copy = tmp_path / f"copy{number}"
        copy.write_bytes(path.read_bytes())
        scalars += [
            (event.step, value.tensor.float_val[0])
            for event in EventFileLoader(str(copy)).Load()
            for value in event.summary.value
        ]
    assert scalars == [(1, 1), (2, 2), (3, 3), (3, 30), (4, 40)]


# --- Files that grow ---


def test_an_object_grows_now_and_then(folder, monkeypatch):
    monkeypatch.setattr(GrowingObject, "INTERVAL", 0.1)
    log = GrowingObject(folder / "log")
    log.write(b"1\n")
    deadline = time.monotonic() + 10
    while not (folder / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (folder / "log").read_bytes() == b"1\n"
    log.close()
    again = GrowingObject(folder / "log")
    again.write(b"2\n")
    again.close()
    assert (folder / "log").read_bytes() == b"1\n2\n"


def test_a_run_that_lost_its_workdir_does_not_write_over_the_next_ones_lines(folder):
    lost = GrowingObject(folder / "log")
    lost.write(b"old\n")
    lost.sync()
    new = GrowingObject(folder / "log")
    new.write(b"new\n")
    new.sync()
    lost.write(b"late\n")
    with pytest.raises(BucketError, match="was written by another run"):
        lost.close()
    new.close()
    assert (folder / "log").read_bytes() == b"old\nnew\n"


def slowly(name):
    """Makes the bucket take a while over an object, longer than anyone waits, and do then what was asked."""

    def refuse(method, asked):
        if method == "POST" and asked.endswith(name):
            time.sleep(0.3)
        return False

    return refuse


def test_a_version_that_was_given_up_and_came_through_is_this_runs(bucket, folder, monkeypatch):
    log = GrowingObject(folder / "log")
    bucket.refuse = slowly("log")
    patient = BucketPath.replace_if
    monkeypatch.setattr(BucketPath, "replace_if", functools.partialmethod(patient, patience=0.1))
    log.write(b"1\n")
    with pytest.raises(BucketError, match="no answer"):
        log.sync()
    time.sleep(0.5)
    assert (folder / "log").read_bytes() == b"1\n"
    bucket.refuse = lambda method, name: False
    monkeypatch.setattr(BucketPath, "replace_if", patient)
    log.write(b"2\n")
    log.close()
    assert (folder / "log").read_bytes() == b"1\n2\n"


def test_lines_wait_while_the_bucket_refuses(bucket, folder, caplog, monkeypatch):
    monkeypatch.setattr(GrowingObject, "INTERVAL", 0.05)
    with MetricsWriter(folder, start_step=0, total_steps=4) as writer:
        bucket.refuse = lambda method, name: method == "POST"
        writer.write(1, {"train/loss": 1.0})
        writer.sync()
        assert re.search(r"PERMISSION_DENIED", caplog.text)
        bucket.refuse = lambda method, name: False
        writer.write(2, {"train/loss": 2.0})
    assert [line["step"] for line in read_metrics(folder)] == [1, 2]


# --- The lock ---


def test_one_run_at_a_time(folder):
    with exclusive(folder) as check:
        check()
        with (
            pytest.raises(WorkdirInUseError, match=r"another run holds gs://.*process \d+ on"),
            exclusive(folder),
        ):
            pass
        check()
    assert not (folder / "lock").exists()
    with exclusive(folder):
        pass


def test_of_two_that_begin_together_one_wins(folder, monkeypatch):
    read = BucketPath.read

    def late(path, **options):
        found = read(path, **options)
        if found.data is None:
            path.write_bytes(json.dumps({"holder": "process 1 on another"}).encode())
        return found

    monkeypatch.setattr(BucketPath, "read", late)
    with pytest.raises(WorkdirInUseError, match="process 1 on another"), exclusive(folder):
        pass


def test_the_lock_of_a_killed_run_is_taken_over(folder, caplog):
    (folder / "lock").write_text(json.dumps({"holder": "process 1 on a host that is gone"}))
    began = time.monotonic()
    with exclusive(folder):
        assert time.monotonic() - began >= lease.SECONDS
        assert "held by process 1 on a host that is gone: watching" in caplog.text
    (folder / "lock").write_bytes(b"\xff")  # Damaged, by whatever.
    with exclusive(folder):
        pass


def test_a_holder_whose_lock_was_taken_over_stops(folder):
    with exclusive(folder) as check:
        (folder / "lock").write_text("{}")  # As another run does that saw no renewal.
        time.sleep(lease.SECONDS / 2)
        with pytest.raises(WorkdirInUseError, match=r"was taken over.*another run may go on"):
            check()
    assert (folder / "lock").read_text() == "{}"  # It is the other run's.


def test_an_outage_does_not_lose_the_lock(bucket, folder, caplog):
    with exclusive(folder) as check:
        bucket.refuse = lambda method, name: name.endswith("lock")
        time.sleep(2 * lease.SECONDS)
        check()
        assert "the lock was not renewed" in caplog.text
        bucket.refuse = lambda method, name: False
        check()
    assert not (folder / "lock").exists()


def test_a_renewal_that_was_given_up_and_came_through_does_not_lose_the_lock(bucket, folder, caplog):
    with exclusive(folder) as check:
        bucket.refuse = slowly("lock")
        time.sleep(3 * lease.SECONDS)
        assert "no answer" in caplog.text
        bucket.refuse = lambda method, name: False
        time.sleep(lease.SECONDS)
        check()
    assert not (folder / "lock").exists()


def test_a_killed_process_leaves_a_lock_that_ends(folder, bucket):
    program = f"""
import time
from vir_jax.runs import lease
from vir_jax.runs.lock import exclusive
from vir_jax.runs.storage import open_workdir
lease.SECONDS = {lease.SECONDS}
with exclusive(open_workdir({str(folder)!r})):
    print("held", flush=True)
    time.sleep(100)
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(WorkdirInUseError, match=f"process {process.pid} on"), exclusive(folder):
        pass
    process.kill()
    process.communicate()
    with exclusive(folder):
        pass


def test_open_workdir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_workdir("~/run") == tmp_path / "run"
    assert open_workdir("run") == Path("run").absolute()
    assert open_workdir("gs://bucket/a/b/") == BucketPath("gs://bucket/a/b")
    assert isinstance(open_workdir("gs://bucket/a"), BucketPath)
    assert storage.RunPath  # What both are.
