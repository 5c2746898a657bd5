"""Preprocessing that is killed, interrupted or out of room, and goes on where it was."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_preprocess import ROOT, digests, names, write

from carflavor.data import sample
from carflavor.data.build import Build
from carflavor.data.journal import Journal
from carflavor.locking import lock
from carflavor.preprocess import WORK_FOLDER

CODE = """
import sys
from carflavor.preprocess import PreprocessConfig, write_records
write_records(PreprocessConfig(source=sys.argv[1], out=sys.argv[2], image_size=64, workers=int(sys.argv[3])))
"""
WHOLE = ["report.html", "report.json", "test.h5", "train.h5", "validation.h5"]


class Killed(BaseException):
    """What nothing catches."""


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    """320 photos for training and 128 for the test."""
    folder = tmp_path_factory.mktemp("many") / "cars"
    sample.write_sample(folder, train_per_class=40, test_per_class=16)
    return folder


@pytest.fixture(scope="module")
def few_cars(tmp_path_factory):
    """32 photos for training and 16 for the test."""
    folder = tmp_path_factory.mktemp("few") / "cars"
    sample.write_sample(folder, train_per_class=4, test_per_class=2)
    return folder


@pytest.fixture
def run(clean_environment):
    """Starts a program of Python's, in a session of its own."""

    def start(*arguments, **environment):
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**clean_environment, "PYTHONPATH": str(ROOT), **environment},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def journal_lines(out):
    path = out / WORK_FOLDER / "journal"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_ten_points_it_ends_with_equal_files(cars, tmp_path, run, workers):
    write(cars, tmp_path / "undisturbed", image_size=64)
    out, random = tmp_path / "out", np.random.default_rng(workers)
    # Lines of the journal at which it is killed: photos that are done, and after these the making of the record files.
    for line in sorted(random.integers(1, 454, 10).tolist()):
        process = run("-c", CODE, cars, out, workers)
        while process.poll() is None and journal_lines(out) < line:
            time.sleep(0.0005)
        # The program alone: the processes that it has started end by themselves.
        process.kill()
        process.communicate()
        assert not {"report.html", "report.json"} & set(names(out)) or not (out / WORK_FOLDER / "journal").is_file()
    process = run("-c", CODE, cars, out, workers)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert digests(out) == digests(tmp_path / "undisturbed")
    assert names(out) == WHOLE
    assert not (out / WORK_FOLDER).exists()


@pytest.mark.parametrize("stage", ["copied", "closing", "closed", "half of the names", "reports"])
def test_killed_while_the_record_files_are_made_it_ends_with_equal_files(few_cars, tmp_path, monkeypatch, stage):
    def kill(*arguments):
        raise Killed

    def add(journal, entries):
        add_entries(journal, entries)
        if entries[0].get("stage") == stage:
            kill()

    def publish_one(build, splits):
        publish(build, ["train"])
        kill()

    write(few_cars, tmp_path / "undisturbed", image_size=16)
    add_entries, publish = Journal.add, Build.publish
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        if stage == "half of the names":
            patch.setattr(Build, "publish", publish_one)
        if stage == "reports":
            patch.setattr("carflavor.preprocess._write_reports", kill)
        with pytest.raises(Killed):
            write(few_cars, tmp_path / "out", image_size=16)
    write(few_cars, tmp_path / "out", image_size=16)
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    assert not (tmp_path / "out" / WORK_FOLDER).exists()


def begin(source, out, monkeypatch, **options):
    """Ends a run after its first photos."""
    add_entries = Journal.add

    def add(journal, entries):
        add_entries(journal, entries)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        with pytest.raises(Killed):
            write(source, out, **options)


def test_it_goes_on_and_says_so(few_cars, tmp_path, monkeypatch, caplog):
    begin(few_cars, tmp_path / "out", monkeypatch, image_size=16)
    with caplog.at_level(logging.INFO, "carflavor"):
        write(few_cars, tmp_path / "out", image_size=16)
    assert "Going on after 16 of 48 photos" in caplog.messages


@pytest.mark.parametrize("change", ["photo", "setting"])
def test_it_starts_over_and_says_so(few_cars, tmp_path, monkeypatch, caplog, change):
    source, out = tmp_path / "cars", tmp_path / "out"
    shutil.copytree(few_cars, source)
    begin(source, out, monkeypatch, image_size=16)
    options = {"image_size": 32 if change == "setting" else 16}
    if change == "photo":
        shutil.copyfile(source / "cars_test" / "00001.jpg", source / "cars_train" / "00001.jpg")
    with caplog.at_level(logging.INFO, "carflavor"):
        write(source, out, **options)
    assert caplog.messages[0] == f"The source or a setting is not what it was when {out} was begun: starting over"
    assert not any(message.startswith("Going on") for message in caplog.messages)
    write(source, tmp_path / "undisturbed", **options)
    assert digests(out) == digests(tmp_path / "undisturbed")


def test_a_photo_that_was_mended_is_read_again(few_cars, tmp_path):
    source, out = tmp_path / "cars", tmp_path / "out"
    shutil.copytree(few_cars, source)
    photo = source / "cars_test" / "00005.jpg"
    photo.write_bytes(b"no photo")
    with pytest.raises(ValueError, match="cars_test/00005.jpg: expected a JPEG.* skip_unreadable=true$"):
        write(source, out, image_size=16)
    assert names(out) == []
    shutil.copyfile(few_cars / "cars_test" / "00005.jpg", photo)
    assert write(source, out, image_size=16)["skipped"] == 0
    assert names(out) == WHOLE


def test_two_runs_do_not_write_to_one_folder(few_cars, tmp_path):
    out = tmp_path / "out"
    with lock(out / WORK_FOLDER / "lock", "taken"), pytest.raises(ValueError) as error:
        write(few_cars, out, image_size=16)
    assert str(error.value) == f"Another process writes record files to {out}: {out / WORK_FOLDER}"


@pytest.mark.parametrize("pack", ["folder", "zip", "tar", "gztar"])
def test_any_number_of_processes_gives_equal_files(few_cars, tmp_path, pack):
    source = few_cars if pack == "folder" else shutil.make_archive(tmp_path / "cars", pack, few_cars)
    for workers in (1, 2):
        write(source, tmp_path / str(workers), image_size=16, workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_a_full_disk_is_told_at_once_and_leaves_no_file(few_cars, tmp_path, monkeypatch):
    def allocate(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    with pytest.raises(OSError, match="No space left on device"):
        write(few_cars, tmp_path / "out", image_size=16)
    assert names(tmp_path / "out") == []


def test_ctrl_c_ends_the_run_as_killed_and_all_its_processes(cars, tmp_path, run, store):
    arguments = ["entrypoints/preprocess.py", "--source", cars, "--image-size", "256", "--workers", "2"]
    process = run(*arguments, "--out", tmp_path / "out", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    while process.poll() is None and journal_lines(tmp_path / "out") < 2:
        time.sleep(0.01)
    # As a terminal does it: to all of them.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert names(tmp_path / "out") == []
    assert [run.info.status for run in store.search_runs(["0"])] == ["KILLED"]
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
