"""Preprocessing on Spark: on a cluster of one master and two workers, and in a local one where that tells as much."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import cv2
import pytest
from servers import web_server
from test_interruption import journal_lines
from test_preprocess import ROOT, digests, draw, names, write, write_drawing

from carflavor import spark
from carflavor.data.build import Build
from carflavor.data.decoding import Task
from carflavor.data.layouts import Photo
from carflavor.data.on_spark import SentStore, ShardWriter
from carflavor.data.records import RecordFile
from carflavor.data.shards import Shard
from carflavor.data.stores import Store
from carflavor.data.virtual import ShardedBuild
from carflavor.preprocess import WORK_FOLDER
from carflavor.spark import check_visible, open_session, run_tasks, running_tasks

sys.path.insert(0, str(ROOT / "benchmarks"))
from clusters import Cluster  # noqa: E402

WHOLE = ["report.html", "report.json", "test.h5", "train.h5", "validation.h5"]
CODE = """
import sys
from carflavor.data.build import Build
from carflavor.preprocess import PreprocessConfig, write_records
Build.shard_size = 16
write_records(PreprocessConfig(source=sys.argv[1], out=sys.argv[2], image_size=32, master=sys.argv[3]))
"""


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    """256 photos for training and 64 for the test, each of which takes a while to decode."""
    folder = tmp_path_factory.mktemp("large") / "cars"
    for number in range(40):
        photo = cv2.imencode(".png", cv2.resize(draw(number), (640, 480)), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        split = "test" if number >= 32 else "train"
        place = folder / split / f"class {number % 8}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(photo.tobytes())
        for copy in range(7):
            os.link(place / f"{number}.png", place / f"{number}-{copy}.png")
    return folder


@pytest.fixture(scope="module")
def expected(cars, tmp_path_factory):
    """What one machine makes of them."""
    folder = tmp_path_factory.mktemp("expected")
    write(cars, folder, image_size=32, workers=2)
    return digests(folder)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster"), 2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def local_session():
    """After the tests on the cluster: those use a session that is there, too."""
    with open_session("local[2]", "test") as session:
        yield session


@pytest.fixture(scope="module")
def few_cars(tmp_path_factory):
    """32 photos for training and 8 for the test."""
    folder = tmp_path_factory.mktemp("small") / "cars"
    for number in range(40):
        path = folder / ("test" if number >= 32 else "train") / f"class {number % 8}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_drawing(path, number)
    return folder


@pytest.fixture(scope="module")
def few_expected(few_cars, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few-expected")
    write(few_cars, folder, image_size=32)
    return digests(folder)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(Build, "shard_size", 16)
    monkeypatch.setattr(ShardedBuild, "shard_size", 8)


def test_killed_it_goes_on_with_the_shards_that_are_whole(cars, expected, cluster, tmp_path, clean_environment):
    out, environment = tmp_path / "out", {**clean_environment, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, cars, out, cluster.master], env=environment, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and journal_lines(out) < 60:
        time.sleep(0.01)
    # The driver alone, and no JVM or executor: those have to see by themselves.
    process.kill()
    process.wait()
    assert 60 <= journal_lines(out) < 320
    write(cars, out, image_size=32, master=cluster.master)
    assert digests(out) == expected
    assert names(out) == WHOLE
    assert not (out / WORK_FOLDER).exists()


def test_a_worker_that_does_not_see_a_folder_is_named_before_any_work(cars, cluster, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    # A machine without the shared drives: it has empty folders in their places.
    script = 'mount -t tmpfs none "$0" && mount -t tmpfs none "$1" && shift && exec "$@"'
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    worker = cluster.start_worker(["unshare", *as_root, "--mount", "sh", "-c", script, out, cars])
    try:
        worker.wait_for("Successfully registered")
        with open_session(cluster.master, "test") as session:
            with pytest.raises(ValueError) as out_error:
                write(cars, out, image_size=32, master=cluster.master)
            with pytest.raises(ValueError) as source_error:
                check_visible(session, tmp_path / "seen", source=SentStore(Store(cars)))
    finally:
        worker.kill()
        cluster.workers.remove(worker)
    host = socket.gethostname()
    assert str(out_error.value) == (
        f"out: expected a folder that this machine and all workers of Spark share, got {out}; "
        f"worker {host}: it does not see what is there"
    )
    assert str(source_error.value) == (
        f"source: expected a place that all workers of Spark see, got {cars}; "
        f"worker {host}: it does not see the same files there"
    )
    assert os.listdir(out) == []


def test_a_worker_that_is_killed_half_way_is_done_without(cars, expected, cluster, tmp_path, monkeypatch):
    def add(build, entries):
        add_entries(build, entries)
        if len(build.done) >= 100 and not killed:
            killed.append(len(build.done))
            cluster.workers.pop().kill()

    killed, add_entries, out = [], Build.add, tmp_path / "out"
    monkeypatch.setattr(Build, "add", add)
    write(cars, out, image_size=32, master=cluster.master)
    assert killed and killed[0] < 320
    assert digests(out) == expected
    assert names(out) == WHOLE
    assert not (out / WORK_FOLDER).exists()


def test_shards_that_are_kept(few_cars, few_expected, local_session, tmp_path, clean_environment):
    out = tmp_path / "out"
    write(few_cars, out, image_size=32, master="local[2]", gather=False)
    assert digests(out) == few_expected
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    assert [path.name for path in sorted(folder.iterdir())] == [
        *(f"test-{first:09d}.h5" for first in range(0, 8, 8)),
        *(f"train-{first:09d}.h5" for first in range(0, 32, 8)),
    ]
    # Moved together they are whole.
    out.rename(tmp_path / "moved")
    out, folder = tmp_path / "moved", tmp_path / "moved" / folder.name
    assert digests(out) == few_expected
    with RecordFile(out / "test.h5") as file:
        assert file.shards == {folder / f"test-{first:09d}.h5" for first in (0,)}
    # Alone they would be black.
    shutil.copy(out / "test.h5", tmp_path / "test.h5")
    missing = tmp_path / folder.name / "test-000000000.h5"
    with pytest.raises(ValueError, match=f"its pixels in 1 shards, without {missing}; copy and move it together"):
        RecordFile(tmp_path / "test.h5")
    # As they would be for a process that may not open all shards.
    code = "import sys; from carflavor.data.records import RecordFile; RecordFile(sys.argv[1])"
    command = ["sh", "-c", 'ulimit -n 200 && exec "$@"', "sh", sys.executable, "-c", code, out / "test.h5"]
    refused = subprocess.run(command, cwd=ROOT, env=clean_environment, capture_output=True, text=True)
    assert "its pixels in 1 shards, too many for the 200 files that a process may open" in refused.stderr
    # The next record files leave none of them behind.
    write(few_cars, out, image_size=32)
    assert digests(out) == few_expected
    assert names(out) == WHOLE


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("stage", ["decoding", "publishing", "published"])
def test_shards_that_are_kept_after_an_interruption(
    few_cars, few_expected, local_session, tmp_path, monkeypatch, stage
):
    def add(build, entries):
        add_entries(build, entries)
        if len(build.done) > 10:
            raise Killed

    def publish(build, splits):
        if stage == "published":
            publish_all(build, splits)
        raise Killed

    out, add_entries, publish_all = tmp_path / "out", ShardedBuild.add, Build.publish
    with monkeypatch.context() as patch:
        if stage == "decoding":
            patch.setattr(ShardedBuild, "add", add)
        else:
            patch.setattr(Build, "publish", publish)
        with pytest.raises(Killed):
            write(few_cars, out, image_size=32, master="local[2]", gather=False)
    write(few_cars, out, image_size=32, master="local[2]", gather=False)
    assert digests(out) == few_expected
    assert not (out / WORK_FOLDER).exists()
    assert len(names(out)) == len(WHOLE) + 1


@pytest.mark.parametrize("gather", [True, False])
def test_a_photo_that_cannot_be_read(few_cars, local_session, tmp_path, gather):
    source, out = tmp_path / "cars", tmp_path / "out"
    shutil.copytree(few_cars, source)
    photo = source / "train" / "class 3" / "19.jpg"
    photo.write_bytes(b"no photo")
    with pytest.raises(ValueError, match=f"^{photo}: expected a JPEG.* skip_unreadable=true$"):
        write(source, out, image_size=32, master="local[2]", gather=gather)
    assert names(out) == []
    summary = write(source, out, image_size=32, master="local[2]", gather=gather, skip_unreadable=True)
    assert [photo["photo"] for photo in summary["skipped_photos"]] == ["train/class 3/19.jpg"]
    write(source, tmp_path / "expected", image_size=32, skip_unreadable=True)
    assert digests(out) == digests(tmp_path / "expected")


def test_archives(few_cars, few_expected, local_session, tmp_path):
    write(shutil.make_archive(tmp_path / "cars", "zip", few_cars), tmp_path / "zip", image_size=32, master="local[2]")
    assert digests(tmp_path / "zip") == few_expected
    archive = shutil.make_archive(tmp_path / "cars", "gztar", few_cars)
    with pytest.raises(ValueError, match=f"got {archive}, which can only be read from its start .* pack it anew as"):
        write(archive, tmp_path / "tgz", master="local[2]")
    assert not (tmp_path / "tgz").exists()


def test_an_archive_that_every_worker_would_fetch_is_refused(few_cars, tmp_path):
    shutil.make_archive(tmp_path / "cars", "zip", few_cars)
    with web_server(tmp_path) as url:
        with pytest.raises(ValueError, match=f"got {url}/cars.zip, an archive at a URL, which each of them would copy"):
            write(f"{url}/cars.zip", tmp_path / "out", master="spark://nowhere:7077")


def test_a_disk_that_takes_nothing_is_told_in_a_sentence(few_cars, local_session):
    tasks = [(Shard("train", 0, 1), [Task("train", 0, Photo("1.jpg", "1.jpg", None, 0, None))])]
    writer = ShardWriter("/dev/full", tasks, Store(few_cars), (("full",), 32, 16))
    with pytest.raises(ValueError, match=r"^worker .*: /dev/full: Not a directory$"):
        run_tasks(local_session, writer, 1)


def test_a_file_that_a_network_drive_shows_late_is_waited_for(local_session, tmp_path, monkeypatch):
    late = tmp_path / "late"

    def find_missing():
        return None if late.exists() else late

    with running_tasks(local_session, str, 1, 0.05, find_missing) as looks:
        for number, _ in enumerate(looks):
            if number == 60:  # three seconds: the task has ended
                late.touch()
    assert late.exists()
    late.unlink()
    monkeypatch.setattr(spark, "_SECONDS_UNTIL_SEEN", 0.5)
    with pytest.raises(
        ValueError, match=f"^master: expected {late}, which a worker of Spark wrote, got nothing; is the"
    ):
        with running_tasks(local_session, str, 1, 0.05, find_missing) as looks:
            for _ in looks:
                assert not late.exists()


def test_without_a_master_no_pyspark_is_needed(clean_environment):
    code = "import sys; sys.modules['pyspark'] = None; import carflavor.preprocess"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_environment, check=True)


def test_gather_is_for_spark():
    with pytest.raises(ValueError, match="^Expected a Spark master where gather=false.* Received: master=''$"):
        write("sample", "nowhere", gather=False)


def test_master_that_is_none():
    with pytest.raises(ValueError, match=r"Expected master to be local\[n\], spark://.*Received: master='head:7077'"):
        write("sample", "nowhere", master="head:7077")


def test_ctrl_c_ends_the_run_and_the_next_one_goes_on(cars, expected, tmp_path, clean_environment, store):
    out, environment = tmp_path / "out", {**clean_environment, "PYTHONPATH": str(ROOT)}
    command = ["entrypoints/preprocess.py", "--source", cars, "--out", out, "--image-size", "32"]
    process = subprocess.Popen(
        [sys.executable, *command, "--master", "local[2]", "--gather", "false"],
        cwd=ROOT,
        env={**environment, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not list(out.glob(f"{WORK_FOLDER}/shards-*/*")):
        time.sleep(0.01)
    # As a terminal does it: to all of them.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert names(out) == []
    assert [run.info.status for run in store.search_runs(["0"])] == ["KILLED"]
    write(cars, out, image_size=32)
    assert digests(out) == expected


def test_what_a_worker_sees(local_session, tmp_path):
    check_visible(local_session, tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"photo")
    store = Store(tmp_path / "photos")
    sent = SentStore(store)
    check_visible(local_session, tmp_path / "new", source=sent)
    (tmp_path / "photos" / "1.jpg").write_bytes(b"another photo")
    said = (
        f"source: expected a place that all workers of Spark see, got {tmp_path}/photos; "
        f"worker {socket.gethostname()}: it does not see the same files there"
    )
    assert sent.find_problem() == said
    with pytest.raises(ValueError) as raised:
        check_visible(local_session, tmp_path / "new", source=sent)
    assert str(raised.value) == said
    assert os.listdir(tmp_path / "new") == []
