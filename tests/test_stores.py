import errno
import gzip
import http.client
import http.server
import io
import multiprocessing
import os
import pickle
import random
import resource
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from azure.storage.blob._shared.policies_async import AsyncStorageRetryPolicy
from colours import PROJECT
from servers import web_server

from carflavor.data import archives, remote, stores
from carflavor.data.drawing import draw_photo
from carflavor.data.failures import UnreachableError
from carflavor.data.layouts import Photo, PhotoReader
from carflavor.data.sources import default_out
from carflavor.data.stores import Store, open_store
from carflavor.data.urls import shown, without_secrets
from carflavor.image import encode_jpeg
from carflavor.preprocess import PreprocessConfig, write_records

FILES = {
    "train/Škoda 100/1.jpg": b"first",
    "train/Škoda 100/2.jpg": b"second one",
    "train/Ram C&V #1/3.jpg": b"",
    "labels.csv": b"photo,class\n" * 100,
}
CLUTTER = {
    ".DS_Store": b"x",
    ".git/config": b"x",
    "train/._1.jpg": b"x",
    "__MACOSX/train/1.jpg": b"x",
    "train/Thumbs.db": b"x",
    "train/desktop.ini": b"x",
}


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("train/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, members, mode="w:gz"):
    """Writes a tar archive of names to bytes, or of TarInfo objects."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = info.size or len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def special(name, kind, **attributes):
    info = tarfile.TarInfo(name)
    info.type = kind
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


WRITERS = {
    "cars": write_folder,
    "cars.zip": write_zip,
    "stored.ZIP": lambda path, files: write_zip(path, files, zipfile.ZIP_STORED),
    "cars.tar": lambda path, files: write_tar(path, files, "w:"),
    "cars.tgz": write_tar,
    "cars.tar.gz": lambda path, files: write_tar(path, {f"./{name}": content for name, content in files.items()}),
    "cars.bin": write_tar,  # what it is is seen in the file
}


@pytest.fixture(params=WRITERS)
def place(request, tmp_path):
    return WRITERS[request.param](tmp_path / request.param, FILES | CLUTTER)


def refuses(place, message):
    with pytest.raises(ValueError) as error:
        Store(place)
    assert str(error.value) == message


def test_what_it_is_called(tmp_path):
    for name, expected in {
        "cars": "cars",
        "cars.zip": "cars",
        "stored.ZIP": "stored",
        "cars.tar": "cars",
        "cars.tar.gz": "cars",
        "cars.bin": "cars.bin",
    }.items():
        store = Store(WRITERS[name](tmp_path / name, FILES))
        assert (store.name, store.place, repr(store)) == (expected, f"{tmp_path}/{name}", f"Store('{tmp_path}/{name}')")


def test_names(place):
    assert Store(place).names == (
        "labels.csv",
        "train/Ram C&V #1/3.jpg",
        "train/Škoda 100/1.jpg",
        "train/Škoda 100/2.jpg",
    )


def test_read(place):
    store = Store(str(place))
    assert {name: store.read(name) for name in store.names} == FILES
    for name in ["train/4.jpg", "train", "../cars/labels.csv", "/etc/passwd", ".git/config", ""]:
        for read in (store.read, store.open):
            with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{place}/{name}'$"):
                read(name)


def test_open(place):
    with Store(place).open("train/Škoda 100/2.jpg") as file:
        assert file.seekable() and file.seek(-3, io.SEEK_END) == 7
        assert file.read() == b"one"
        assert file.read() == b""
        file.seek(2)
        assert (file.read(4), file.tell()) == (b"cond", 6)


def test_read_many(place):
    store = Store(place)
    asked = ["train/Škoda 100/2.jpg", "labels.csv", "gone.jpg", "labels.csv", "train/Škoda 100/1.jpg"]
    answers = list(store.read_many(iter(asked)))
    found = {name: content for name, content in answers if name != "gone.jpg"}
    assert len(answers) == 4 and found == {name: FILES[name] for name in asked if name != "gone.jpg"}
    assert isinstance(dict(answers)["gone.jpg"], FileNotFoundError)
    assert list(store.read_many([])) == []


def test_pickle(place, monkeypatch):
    store = Store(place)
    store.read("labels.csv")
    # The listing goes with it: of a compressed tar it takes a pass.
    monkeypatch.setattr(archives.Tar, "_list", None)
    again = pickle.loads(pickle.dumps(store))
    assert (again.place, again.name, again.names) == (store.place, store.name, store.names)
    assert dict(again.read_many(again.names)) == FILES


def test_a_forked_process_opens_its_own_file(place):
    store = Store(place)
    store.read("labels.csv")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map_async(store.read, store.names * 50, chunksize=1)
        for _ in range(50):
            assert dict(store.read_many(store.names)) == FILES
        assert results.get(60) == [FILES[name] for name in store.names] * 50


def test_a_compressed_tar_is_gone_through_once(tmp_path, monkeypatch):
    photos = {f"{number}.jpg": bytes([number]) * 1000 for number in range(50)}
    store = Store(write_tar(tmp_path / "cars.tgz", photos))
    opened, rewound = [], []
    rewind = gzip._GzipReader._rewind
    monkeypatch.setattr(archives.gzip, "open", lambda path: opened.append(path) or gzip.GzipFile(path))
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: rewound.append(self) or rewind(self))
    assert dict(store.read_many(reversed(store.names))) == photos
    assert (len(opened), rewound) == (1, [])


def test_the_later_of_two_files_of_one_name(tmp_path):
    with tarfile.open(tmp_path / "cars.tgz", "w:gz") as archive:
        for content in (b"one", b"other"):
            info = tarfile.TarInfo("1.jpg")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    store = Store(tmp_path / "cars.tgz")
    assert (store.names, store.read("1.jpg")) == (("1.jpg",), b"other")


def test_empty_places(tmp_path):
    for name, write in WRITERS.items():
        path = tmp_path / name
        if name == "cars":
            path.mkdir()
        store = Store(write(path, {}))
        assert (store.names, list(store.read_many([]))) == ((), [])


def test_links_in_a_folder_are_followed_but_not_in_a_circle(tmp_path):
    write_folder(tmp_path / "elsewhere", {"1.jpg": b"1"})
    folder = write_folder(tmp_path / "cars", {"a/2.jpg": b"2"})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "3.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "a" / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    store = Store(folder)
    assert store.names == ("3.jpg", "a/2.jpg", "linked/1.jpg")
    assert store.read("linked/1.jpg") == b"1"


def test_a_file_that_went_after_the_listing(tmp_path):
    store = Store(write_folder(tmp_path / "cars", FILES))
    (tmp_path / "cars" / "labels.csv").unlink()
    with pytest.raises(FileNotFoundError, match="cars/labels.csv"):
        store.read("labels.csv")


@pytest.mark.parametrize("name", ["cars", "cars.zip", "cars.tar"])
def test_what_this_machine_is_short_of_is_no_broken_photo(name, tmp_path):
    sent = pickle.dumps(Store(WRITERS[name](tmp_path / name, FILES)))
    photos = pickle.loads(sent).read_many(["labels.csv"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(UnreachableError) as error:
            next(photos)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert str(error.value) == (
        f"{tmp_path}/{name}/labels.csv cannot be read for now: Too many open files; "
        "the same command goes on where it was"
    )


@pytest.mark.parametrize("name", ["cars.zip", "cars.tar", "cars.tgz"])
def test_a_drive_that_is_gone_has_no_damaged_archives(name, tmp_path, monkeypatch):
    store = Store(WRITERS[name](tmp_path / name, FILES))

    class Gone:
        def __init__(self, file):
            self.close = file.close

        def seek(self, position):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    begin = archives._Part.__init__
    monkeypatch.setattr(archives._Part, "__init__", lambda part, file, *args: begin(part, Gone(file), *args))
    with pytest.raises(UnreachableError, match=f"^{tmp_path}/{name}/labels.csv cannot be read for now: Stale file"):
        store.read("labels.csv")


def test_names_beyond_utf8_are_refused(tmp_path):
    folder = tmp_path / "cars"
    folder.mkdir()
    (Path(os.fsdecode(bytes(folder) + b"/Citro\xebn.jpg"))).write_bytes(b"")
    refuses(folder, rf"{folder}: expected file names in UTF-8, got 'Citro\udceb" + "n.jpg'")


@pytest.mark.parametrize("name", ["cars", "cars.zip", "cars.tar", "cars.tgz"])
def test_what_is_too_large_to_be_read_at_once(name, tmp_path, monkeypatch):
    store = Store(WRITERS[name](tmp_path / name, FILES))
    monkeypatch.setattr(stores, "MAX_READ_BYTES", 1000)
    with pytest.raises(OSError, match=f"^{tmp_path}/{name}/labels.csv: expected at most 0 MB, got 0 MB$"):
        store.read("labels.csv")
    assert store.read("train/Škoda 100/1.jpg") == b"first"
    with store.open("labels.csv") as file:
        assert file.read(5) == b"photo"


def test_places_that_are_none(tmp_path):
    refuses("", "expected a path or URL, got an empty text")
    refuses("/no/where", "/no/where does not exist")
    (tmp_path / "cars.rar").write_bytes(b"Rar!\x1a\x07\x01\x00")
    expected = "expected a folder or a .zip, .tar, .tgz or .tar.gz archive, got a file that begins with "
    refuses(tmp_path / "cars.rar", rf"{tmp_path}/cars.rar: {expected}b'Rar!\x1a\x07\x01\x00'")
    (tmp_path / "cars.zip").write_bytes(b"")
    refuses(tmp_path / "cars.zip", f"{tmp_path}/cars.zip: {expected}b''")


PLAIN = "expected plain files and folders, got "
BELOW = "expected names below one folder, got "
HOSTILE_TARS = {
    "above": ({"cars/../../x.jpg": b""}, BELOW + "'cars/../../x.jpg'"),
    "absolute": ({"/etc/x.jpg": b""}, BELOW + "'/etc/x.jpg'"),
    "drive": ({"C:\\x.jpg": b""}, BELOW + r"'C:\\x.jpg'"),
    "folder above": ({special("..", tarfile.DIRTYPE): b""}, BELOW + "'..'"),
    "link": ({special("x.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"): b""}, PLAIN + "the link 'x.jpg'"),
    "hard link": ({special("x.jpg", tarfile.LNKTYPE, linkname="y.jpg"): b""}, PLAIN + "the link 'x.jpg'"),
    "device": ({special("x", tarfile.CHRTYPE): b""}, PLAIN + "the device or special file 'x'"),
    "pipe": ({special("x", tarfile.FIFOTYPE): b""}, PLAIN + "the device or special file 'x'"),
    "sparse": ({special("x", tarfile.GNUTYPE_SPARSE): bytes(512)}, PLAIN + "the device or special file 'x'"),
    "bomb": (
        {special("x", tarfile.REGTYPE, size=5_000_000_000): b""},
        "expected an archive of photos, got one of 0.0 MB that unpacks to more than 1 GB",
    ),
    "long name": (
        {special("x", tarfile.GNUTYPE_LONGNAME, size=2_000_000_000): b""},
        "expected a whole archive, got one that is cut off or damaged: a header of 2000000000 bytes",
    ),
    "back": (
        {special("x", tarfile.XHDTYPE, size=-1024): b""},
        "expected a whole archive, got one that is cut off or damaged: a header of -1024 bytes",
    ),
    "round in a circle": (
        {special("x", tarfile.CHRTYPE, size=-512): b""},
        "expected a whole archive, got one that is cut off or damaged: 'x' of -512 bytes",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_TARS)
@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_hostile_tars(case, mode, tmp_path):
    members, message = HOSTILE_TARS[case]
    with tarfile.open(tmp_path / "x.tar", mode, format=tarfile.GNU_FORMAT) as archive:
        for name, content in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            archive.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + content)
            archive.offset = archive.fileobj.tell()
    refuses(tmp_path / "x.tar", f"{tmp_path}/x.tar: {message}")


def zip_entry(name, **attributes):
    entry = zipfile.ZipInfo(name)
    for attribute, value in attributes.items():
        setattr(entry, attribute, value)
    return entry


LINK, DEVICE = 0o120777 << 16, 0o020666 << 16
HOSTILE_ZIPS = {
    "above": (zip_entry("../x.jpg"), BELOW + "'../x.jpg'"),
    "absolute": (zip_entry("/x.jpg"), BELOW + "'/x.jpg'"),
    "from Windows": (zip_entry("..\\x.jpg", create_system=0), BELOW + "'../x.jpg'"),
    "link": (zip_entry("x.jpg", external_attr=LINK, create_system=3), PLAIN + "the link 'x.jpg'"),
    "device": (zip_entry("x", external_attr=DEVICE, create_system=3), PLAIN + "the device or special file 'x'"),
    "lzma": (
        zip_entry("x.jpg", compress_type=zipfile.ZIP_LZMA),
        "expected files that are stored or deflated, got 'x.jpg' compressed by method 14",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_ZIPS)
def test_hostile_zips(case, tmp_path):
    entry, message = HOSTILE_ZIPS[case]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(entry, b"x")
    refuses(tmp_path / "x.zip", f"{tmp_path}/x.zip: {message}")


def patched(path, offset, content):
    """Overwrites bytes of a zip's directory, counted from its first entry."""
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02") + offset
    data[start : start + len(content)] = content
    path.write_bytes(data)
    return path


def test_an_encrypted_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.jpg", b"x")
    path = patched(tmp_path / "x.zip", 8, b"\x01")
    refuses(path, f"{path}: expected an archive without a password, got 'x.jpg' encrypted")


def test_a_zip_that_says_it_is_large(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.jpg", bytes(1000))
    path = patched(tmp_path / "x.zip", 24, (3_000_000_000).to_bytes(4, "little"))
    refuses(path, f"{path}: expected an archive of photos, got one of 0.0 MB that unpacks to more than 1 GB")


def test_a_zip_that_says_it_is_small(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.jpg", bytes(200_000_000))
    path = patched(tmp_path / "x.zip", 24, (5000).to_bytes(4, "little"))
    store = Store(path)
    tracemalloc.start()
    with pytest.raises(OSError, match=f"^{path}/x.jpg is damaged: Bad CRC-32 for file 'x.jpg'$"):
        store.read("x.jpg")
    with store.open("x.jpg") as file, pytest.raises(OSError, match="is damaged"):
        file.read()
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_names_with_backslashes_in_a_zip_from_windows(tmp_path):
    with zipfile.ZipFile(tmp_path / "cars.zip", "w") as archive:
        archive.writestr(zip_entry("train\\1.jpg", create_system=0), b"1")
    assert Store(tmp_path / "cars.zip").read("train/1.jpg") == b"1"


def test_a_damaged_photo_in_a_zip(tmp_path):
    path = write_zip(tmp_path / "cars.zip", {"1.jpg": b"one" * 9, "2.jpg": b"two"}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"oneoneone", b"oneONEone"))
    answers = dict(Store(path).read_many(["1.jpg", "2.jpg"]))
    assert str(answers["1.jpg"]) == f"{path}/1.jpg is damaged: Bad CRC-32 for file '1.jpg'"
    assert answers["2.jpg"] == b"two"


@pytest.mark.parametrize("name", ["cars.zip", "cars.tar", "cars.tgz"])
def test_truncated_archives(name, tmp_path):
    photos = {f"{number}.jpg": random.Random(number).randbytes(3000) for number in range(5)}
    data = WRITERS[name](tmp_path / name, photos).read_bytes()
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        # The end of a tar is zeros up to a multiple of 10,240 bytes: nothing is lost with them.
        whole = 5 * (512 + 3072) if name == "cars.tar" else len(data)
        (tmp_path / name).write_bytes(data[: int(whole * share)])
        with pytest.raises(ValueError, match="expected a whole archive, got one that is cut off or damaged: ."):
            Store(tmp_path / name)


@pytest.mark.parametrize("name", ["cars.zip", "cars.tar", "cars.tgz"])
def test_archives_with_other_bytes_are_read_or_refused(name, tmp_path):
    data = WRITERS[name](tmp_path / name, FILES).read_bytes()
    dice = random.Random(0)
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        (tmp_path / name).write_bytes(broken)
        try:
            store = Store(tmp_path / name)
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path}/{name}: expected ")
            continue
        for _, content in store.read_many(store.names):
            assert isinstance(content, bytes | OSError)


# At URLs


@pytest.fixture
def web(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "web").mkdir()
    with web_server(tmp_path / "web") as url:
        yield url


@pytest.mark.parametrize("name", ["cars.zip", "cars.tar", "cars.tgz"])
def test_an_archive_on_a_web_server(name, tmp_path, web):
    WRITERS[name](tmp_path / "web" / name, FILES | CLUTTER)
    store = Store(f"{web}/{name}?download=1")
    assert (store.name, store.place) == ("cars", f"{web}/{name}")
    assert dict(store.read_many(store.names)) == FILES
    (tmp_path / "web" / name).unlink()
    # It was fetched whole, and an unpickled one of the same machine reads the same copy.
    assert pickle.loads(pickle.dumps(store)).read("labels.csv") == FILES["labels.csv"]


def test_a_name_with_blanks_on_a_web_server(tmp_path, web):
    write_zip(tmp_path / "web" / "my cars.zip", FILES)
    assert Store(f"{web}/my%20cars.zip").name == "my cars"


def test_what_a_web_server_may_answer(tmp_path, web):
    refuses(f"{web}/gone.zip", f"{web}/gone.zip does not exist")
    (tmp_path / "web" / "login.zip").write_text("<!DOCTYPE html><p>Please log in")
    refuses(
        f"{web}/login.zip",
        f"{web}/login.zip: expected a folder or a .zip, .tar, .tgz or .tar.gz archive, got a file that begins with "
        "b'<!DOCTYPE html><'",
    )
    with pytest.raises(ValueError, match=r"^http://127.0.0.1:9/cars.zip: Cannot connect to host 127.0.0.1:9"):
        Store("http://127.0.0.1:9/cars.zip")


class Listening(http.server.BaseHTTPRequestHandler):
    """Answers everything with an empty zip, and remembers what it was asked."""

    asked = []

    def do_GET(self):
        self.asked.append((self.path, self.headers["Authorization"]))
        content = b"PK\x05\x06" + bytes(18)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Nothing."""


def test_a_password_from_netrc_and_a_proxy_from_the_environment(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    Listening.asked.clear()
    with web_server(Listening) as url:
        Store(f"{url}/cars.zip")
        monkeypatch.setenv("http_proxy", url)
        Store("http://example.invalid/cars.zip")
    assert Listening.asked == [("/cars.zip", "Basic YWRhOnNlY3JldA=="), ("http://example.invalid/cars.zip", None)]


class CutOff(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"PK half of it")

    def log_message(self, *args):
        """Nothing."""


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with web_server(CutOff) as url:
        place = remote.RemotePlace(f"{url}/cars.zip")
        with pytest.raises(OSError, match=f"^{url}/cars.zip: Response payload is not completed"):
            place.copy(tmp_path / "cars.zip")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space(tmp_path, monkeypatch, container):
    container.upload_blob("train.h5", b"12345")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4}))
    place = remote.RemotePlace(f"abfss://{container.container_name}/train.h5")
    with pytest.raises(OSError, match="expected 0.0 GB of space in .*, got 0.0 GB; TMPDIR names another folder$"):
        place.copy(tmp_path / "train.h5")


@pytest.mark.parametrize(
    "url",
    [
        "abfss://{}@devstoreaccount1.dfs.core.windows.net/data/cars",
        "abfss://{}/data/cars",
        "az://{}/data/cars/",
        "ABFSS://{}/data/cars",
    ],
)
def test_a_folder_on_azure(url, container):
    for name, content in (FILES | CLUTTER).items():
        container.upload_blob(f"data/cars/{name}", content)
    container.upload_blob("data/cars and more/1.jpg", b"1")
    # What a Data Lake shows of its folders to clients of Blob Storage.
    container.upload_blob("data/cars/train", b"", metadata={"hdi_isfolder": "true"})
    store = Store(url.format(container.container_name))
    assert store.name == "cars"
    assert store.names == tuple(sorted(FILES))
    assert list(store.read_many(store.names)) == [(name, FILES[name]) for name in store.names]
    assert store.read("labels.csv") == FILES["labels.csv"]
    with store.open("train/Škoda 100/2.jpg") as file:
        file.seek(-3, io.SEEK_END)
        assert file.read() == b"one"
    with pytest.raises(FileNotFoundError, match="No such file or directory: .*cars/gone.jpg'$"):
        store.read("gone.jpg")


def test_a_container_on_azure(container):
    container.upload_blob("1.jpg", b"1")
    store = Store(f"abfss://{container.container_name}@devstoreaccount1.dfs.core.windows.net")
    assert (store.name, store.names, store.read("1.jpg")) == (container.container_name, ("1.jpg",), b"1")


@pytest.mark.parametrize("name", ["cars.zip", "cars.tgz"])
def test_an_archive_on_azure(name, container, tmp_path):
    container.upload_blob(name, WRITERS[name](tmp_path / name, FILES).read_bytes())
    store = Store(f"abfss://{container.container_name}/{name}")
    assert (store.name, dict(store.read_many(store.names))) == ("cars", FILES)


def test_many_photos_on_azure_within_bounds(container, monkeypatch):
    photos = {f"{number:03}.jpg": bytes([number]) * 1000 for number in range(100)}
    for name, content in photos.items():
        container.upload_blob(name, content)
    store = Store(f"abfss://{container.container_name}")
    monkeypatch.setattr(remote, "_BYTES_AHEAD", 10_000)
    fetched = []
    read = remote.RemotePlace._read
    monkeypatch.setattr(remote.RemotePlace, "_read", lambda self, *args: fetched.append(args) or read(self, *args))
    most = 0
    answers = store.read_many(reversed(store.names))
    for number, (name, content) in enumerate(answers, start=1):
        assert (name, content) == (f"{100 - number:03}.jpg", photos[name])
        most = max(most, len(fetched) - number)
    assert 0 < most <= 10
    # Nobody has to take them all.
    del fetched[:]
    next(answers := store.read_many(store.names))
    answers.close()
    assert len(fetched) <= 11


def test_a_photo_that_went_from_azure_after_the_listing(container):
    container.upload_blob("1.jpg", b"1")
    container.upload_blob("2.jpg", b"2")
    store = Store(f"abfss://{container.container_name}")
    container.delete_blob("1.jpg")
    answers = dict(store.read_many(store.names))
    assert isinstance(answers["1.jpg"], FileNotFoundError)
    assert str(answers["1.jpg"]) == f"abfss://{container.container_name}/1.jpg does not exist"
    assert answers["2.jpg"] == b"2"


class Unsteady(http.server.BaseHTTPRequestHandler):
    """Passes on what Azurite is asked, but answers as often with a status as `answers` has for the name of a photo."""

    protocol_version = "HTTP/1.1"
    behind, answers, asked = None, {}, []

    def do_GET(self):
        name = urlsplit(self.path).path.rpartition("/")[2]
        self.asked.append(name)
        if self.answers.get(name) and (status := self.answers[name].pop()) != 200:
            headers, body = [], b""
        else:
            connection = http.client.HTTPConnection(urlsplit(self.behind).netloc)
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            status, headers, body = answer.status, answer.getheaders(), answer.read()
            connection.close()
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in ("connection", "content-length", "date", "server", "transfer-encoding"):
                self.send_header(key, value)
        # What a HEAD is answered is as long as the file, and empty.
        length = dict(headers).get("content-length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture
def unsteady(container, monkeypatch):
    """The URL of two photos on Azure, `1.jpg` and `2.jpg`, and what `Unsteady` answers by the name of one."""
    for number in (1, 2):
        container.upload_blob(f"{number}.jpg", b"%d" % number)
    connection = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
    endpoint = connection.partition("BlobEndpoint=")[2].rstrip(";")
    monkeypatch.setattr(Unsteady, "behind", endpoint)
    monkeypatch.setattr(Unsteady, "answers", answers := {})
    monkeypatch.setattr(Unsteady, "asked", [])
    monkeypatch.setattr(remote, "_PAUSES", (0, 0))
    # Azure's own, which take a minute.
    monkeypatch.setattr(AsyncStorageRetryPolicy, "increment", lambda *args, **options: False)
    with web_server(Unsteady) as url:
        own = connection.replace(endpoint, url + urlsplit(endpoint).path)
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", own)
        yield f"abfss://{container.container_name}", answers


def test_a_photo_is_asked_for_again(unsteady):
    url, answers = unsteady
    store = Store(url)
    answers["1.jpg"] = [503, 429]
    assert dict(store.read_many(store.names)) == {"1.jpg": b"1", "2.jpg": b"2"}
    assert Unsteady.asked.count("1.jpg") == 3


def test_a_place_that_cannot_be_reached_is_no_broken_photo(unsteady):
    url, answers = unsteady
    store = Store(url)
    answers["1.jpg"] = [503] * 6
    photo = Photo("1.jpg", "1.jpg", None, 0, None)
    for read in (lambda: dict(store.read_many(store.names)), lambda: list(PhotoReader(store).read_many([photo]))):
        with pytest.raises(UnreachableError) as error:
            read()
        assert str(error.value).startswith(f"{url}/1.jpg cannot be read for now: ")
        assert str(error.value).endswith("; the same command goes on where it was") and "\n" not in str(error.value)
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert store.read("1.jpg") == b"1"


def test_photos_inside_a_table_of_a_place_that_cannot_be_reached(unsteady, container):
    url, answers = unsteady
    pq.write_table(pa.table({"image": [b"one", b"other"]}), file := io.BytesIO())
    container.upload_blob("cars.parquet", file.getvalue())
    store, photos = Store(url), [Photo(f"{row}.jpg", "cars.parquet", row, 0, None) for row in range(2)]
    answers["cars.parquet"] = [503, 200, 503]
    assert [content for _, content in PhotoReader(store).read_many(photos)] == [b"one", b"other"]
    answers["cars.parquet"] = [503] * 3 + [200]
    with pytest.raises(UnreachableError, match=f"^{url}/cars.parquet cannot be read for now: "):
        list(PhotoReader(store).read_many(photos))


def test_a_step_goes_on_when_the_place_can_be_reached_again(unsteady, container, tmp_path):
    url, answers = unsteady
    for number in range(6):
        photo = encode_jpeg(draw_photo(number % 2, np.random.default_rng(number))[0])
        container.upload_blob(f"cars/{number % 2}/{number}.jpg", photo)
    config = PreprocessConfig(f"{url}/cars", skip_unreadable=True, out=str(tmp_path / "out"), workers=1)
    answers["5.jpg"] = [503] * 3
    with pytest.raises(UnreachableError, match=f"^{url}/cars/1/5.jpg cannot be read for now: "):
        write_records(config)
    assert write_records(config)[1]["skipped"] == 0


def test_a_photo_that_is_missing_is_asked_for_once(unsteady):
    url, answers = unsteady
    store = Store(url)
    answers["1.jpg"] = [404]
    found = dict(store.read_many(store.names))
    assert isinstance(found["1.jpg"], OSError) and not isinstance(found["1.jpg"], UnreachableError)
    assert (found["2.jpg"], Unsteady.asked.count("1.jpg")) == (b"2", 1)


def test_credentials_that_end_do_not_make_broken_photos_of_the_rest(unsteady):
    url, answers = unsteady
    store = Store(url)
    answers["1.jpg"] = [403]
    with pytest.raises(UnreachableError, match=f"^{url}/1.jpg cannot be read for now: .*; the same command goes on"):
        dict(store.read_many(store.names))
    assert Unsteady.asked.count("1.jpg") == 1


def test_what_is_not_on_azure(container):
    name = container.container_name
    for url in ("abfss://nowhere/cars", f"abfss://{name}/cars"):
        refuses(url, f"{url} does not exist")
    assert Store(f"abfss://{name}").names == ()


def test_stores_go_to_other_processes(container, tmp_path):
    """Also what is in a temporary folder of this one, which another machine lacks."""
    container.upload_blob("cars/1.jpg", b"1")
    container.upload_blob("cars.zip", write_zip(tmp_path / "cars.zip", {"2.jpg": b"2"}).read_bytes())
    name = container.container_name
    sent = [Store(f"abfss://{name}/cars"), Store(f"abfss://{name}/cars.zip")]
    data = pickle.dumps(sent)
    Path(sent[1]._archive).unlink()
    code = "import pickle, sys; print([s.read(s.names[0]) for s in pickle.load(sys.stdin.buffer)])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, input=data, capture_output=True)
    assert ended.stdout == b"[b'1', b'2']\n", ended.stderr.decode()


def test_a_forked_process_reads_from_azure(container):
    container.upload_blob("1.jpg", b"1")
    store = Store(f"abfss://{container.container_name}")
    assert store.read("1.jpg") == b"1"
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map_async(store.read, ["1.jpg"]).get(60) == [b"1"]


def test_the_account_of_the_url_counts(container, monkeypatch):
    refuses(
        "abfss://cars@other.dfs.core.windows.net/x",
        "abfss://cars@other.dfs.core.windows.net/x: expected the storage account of AZURE_STORAGE_CONNECTION_STRING, "
        "devstoreaccount1, got other",
    )
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    refuses(
        "abfss://cars/x",
        "abfss://cars/x: expected a storage account, as in abfss://container@account.dfs.core.windows.net/... or in "
        "the variable AZURE_STORAGE_ACCOUNT_NAME, got none",
    )


@pytest.mark.parametrize(
    ("url", "account_url"),
    [
        ("abfss://c@one.dfs.core.windows.net/x", "https://one.blob.core.windows.net"),
        ("abfss://one.dfs.core.windows.net/c/x", "https://one.blob.core.windows.net"),
        ("abfss://c@one.dfs.core.chinacloudapi.cn/x", "https://one.blob.core.chinacloudapi.cn"),
    ],
)
def test_the_endpoint_of_an_account(url, account_url, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    files, path = remote._open_filesystem(url)
    assert (files.account_url, path) == (account_url, "c/x")


@pytest.mark.parametrize("host", ["one.z01.{}.storage.azure.net", "onelake.{}.fabric.microsoft.com"])
def test_hosts_of_azure(host, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    assert remote._azure_options(f"abfss://c@{host.format('dfs')}/x")["account_host"] == host.format("blob")


def test_a_wrong_key_is_not_shown(container, monkeypatch):
    connection = os.environ["AZURE_STORAGE_CONNECTION_STRING"].replace("Eby8vdM0", "AAAAAAAA")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    with pytest.raises(ValueError) as error:
        Store(f"abfss://{container.container_name}/cars")
    assert str(error.value).startswith(f"abfss://{container.container_name}/cars: ")
    assert "Server failed to authenticate the request" in str(error.value)
    assert "AAAAAAAA" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://ada:secret@example.com/cars.zip", "https://example.com/cars.zip"),
        ("https://ghp_secret@example.com/cars.zip", "https://example.com/cars.zip"),
        ("https://a.blob.core.windows.net/c/cars.zip?sv=1&sig=secret%3D", "https://a.blob.core.windows.net/c/cars.zip"),
        ("https://b.s3.amazonaws.com/cars.zip?X-Amz-Signature=secret", "https://b.s3.amazonaws.com/cars.zip"),
        ("https://example.com/cars.zip?api_key=secret#x", "https://example.com/cars.zip"),
        ("s3://AKIA:secret@bucket/cars", "s3://bucket/cars"),
        ("ftp://ada:secret@example.com/cars", "ftp://example.com/cars"),
        ("abfss://c@a.dfs.core.windows.net/cars?sig=secret", "abfss://c@a.dfs.core.windows.net/cars"),
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url, place):
    refuses(
        url,
        f"{place}: expected a URL without a password, token or signature, for MLflow records parameters; give it by "
        "the environment, for instance in AZURE_STORAGE_SAS_TOKEN, or for http in ~/.netrc",
    )


def test_what_is_shown(monkeypatch):
    assert shown("/no/url?x") == "/no/url?x"
    assert shown("zip://x::https://ada:secret@example.com/y.zip") == "zip://x::https://example.com/y.zip"
    assert shown("abfss://c@a.dfs.core.windows.net/Ram #1") == "abfss://c@a.dfs.core.windows.net/Ram #1"
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sv=1&sig=hidden12")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a;AccountKey=hidden34;")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden56")
    text = "GET /x?sv=1&sig=hidden12 by hidden34 or hidden56, AccountKey=hidden78;EndpointSuffix=x, url='https://x/y?t=hidden90'"
    assert without_secrets(text) == "GET /x*** by *** or ***, AccountKey=***;EndpointSuffix=x, url='https://x/y'"


def test_drivers_that_are_not_there(monkeypatch):
    for scheme, module in {"abfss": "adlfs", "s3": "s3fs"}.items():
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "a")
    message = "the driver for {}:// is not installed: pip install 'carflavor[{}]'"
    refuses("abfss://c/cars", "abfss://c/cars: " + message.format("abfss", "azure"))
    refuses("s3://bucket/cars", "s3://bucket/cars: " + message.format("s3", "s3"))
    refuses("gopher://x/cars", "gopher://x/cars: Protocol not known: gopher")
    refuses("zip://cars::https://x/y.zip", "zip://cars::https://x/y.zip: expected one URL, got several joined by ::")


def test_other_stores_of_fsspec():
    files = fsspec.filesystem("memory")
    files.pipe({"/cars/train/1.jpg": b"1", "/cars/.hidden": b""})
    store = Store("memory://cars")
    assert (store.names, list(store.read_many(store.names))) == (("train/1.jpg",), [("train/1.jpg", b"1")])


def test_sources_of_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_zip(tmp_path / "cars.zip", FILES)
    for place in ("cars.zip", str(tmp_path / "cars.zip"), (tmp_path / "cars.zip").as_uri()):
        assert open_store(place, "source").names == tuple(sorted(FILES))
    for place, message in {
        "gone.zip": f"source: the relative path gone.zip does not exist in {tmp_path}, where the step runs; type it in",
        "https://a:b@example.com/x.zip": "source: https://example.com/x.zip: expected a URL without a password",
        "runs:/nope/cars": "source: nothing could be read from runs:/nope/cars: ",
    }.items():
        with pytest.raises(ValueError) as error:
            open_store(place, "source")
        assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["cars", "cars.zip", "cars.tgz"])
def test_an_artifact_is_the_same_each_time_it_is_copied(name, store, tmp_path):
    files = {"labels.csv": b"photo,class", "train/1.jpg": b"1"}
    with mlflow.start_run() as run:
        mlflow.log_artifact(WRITERS[name](tmp_path / name, files))
    uri = f"runs:/{run.info.run_id}/{name}"
    one, other = (open_store(uri, "source") for _ in range(2))
    assert (one.place, one.name, one.read("labels.csv")) == (uri, "cars", files["labels.csv"])
    assert one.fingerprint() == other.fingerprint()
    assert default_out("records", uri, one) == default_out("records", uri, other)
    (changed := tmp_path / "changed").mkdir()
    with mlflow.start_run(run.info.run_id):
        mlflow.log_artifact(WRITERS[name](changed / name, files | {"labels.csv": b""}))
    assert open_store(uri, "source").fingerprint() != one.fingerprint()


def test_a_whole_run_as_a_source(store):
    with mlflow.start_run() as run:
        mlflow.log_text("1", "1.jpg")
    assert [open_store(f"runs:/{run.info.run_id}/", "source").name for _ in range(2)] == [run.info.run_id] * 2


def test_what_is_a_copy(web, tmp_path):
    for name in ("cars.zip", "cars.tgz"):
        WRITERS[name](tmp_path / "web" / name, FILES)
        assert Store(f"{web}/{name}").is_copy and pickle.loads(pickle.dumps(Store(f"{web}/{name}"))).is_copy
        assert not Store(tmp_path / "web" / name).is_copy
    fsspec.filesystem("memory").pipe("/lorries/1.jpg", b"1")
    assert not Store(tmp_path).is_copy and not Store("memory://lorries").is_copy
