"""Photos that a table names, see also `test_score.py`."""

import errno
import http.server
import os

import mlflow
import pytest
from servers import web_server

from carflavor.data import remote, unlabelled
from carflavor.data.failures import UnreachableError
from carflavor.data.unlabelled import list_photos


class Unsteady(http.server.BaseHTTPRequestHandler):
    """Answers with the statuses that `answers` has for a path, the last one for good; with its path as content."""

    answers, asked = {}, []

    def do_GET(self):
        self.asked.append(self.path)
        statuses = self.answers.get(self.path, [200])
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture
def web(monkeypatch):
    """The URL of a server as `Unsteady`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "_PAUSES", (0, 0))
    monkeypatch.setattr(Unsteady, "answers", {})
    monkeypatch.setattr(Unsteady, "asked", [])
    with web_server(Unsteady) as url:
        yield url


def list_table(path, *names):
    path.write_text("\n".join(["path", *names]))
    return list_photos(str(path))


def test_a_photo_of_a_table_is_asked_for_again(web, tmp_path):
    Unsteady.answers |= {"/1.jpg": [503, 429, 200], "/2.jpg": [503], "/3.jpg": [404], "/4.jpg": [403]}
    photos = list_table(tmp_path / "cars.csv", *(f"{web}/{number}.jpg" for number in range(1, 6)))
    found = {name[-5:]: content for name, content in photos.store.read_many(photos.names)}
    assert (found["1.jpg"], found["5.jpg"]) == (b"/1.jpg", b"/5.jpg")
    # One server of many: the others' photos are scored all the same.
    assert str(found["2.jpg"]).startswith(f"{web}/2.jpg: 503, message='Service Unavailable'")
    assert str(found["3.jpg"]) == f"{web}/3.jpg does not exist"
    assert str(found["4.jpg"]).startswith(f"{web}/4.jpg: 403, message='Forbidden'")
    assert [Unsteady.asked.count(f"/{number}.jpg") for number in range(1, 6)] == [3, 3, 1, 1, 1]


def test_a_server_that_is_gone_is_waited_for_once(web, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    monkeypatch.setattr(remote, "_PAUSES", (1, 4))
    monkeypatch.setattr(unlabelled, "_PHOTOS_AHEAD", 1)
    photos = list_table(tmp_path / "cars.csv", *(f"http://127.0.0.1:9/{number}.jpg" for number in range(9)), f"{web}/9")
    *gone, (_, content) = photos.store.read_many(photos.names)
    assert (pauses, content) == ([1, 4], b"/9")
    for name, error in gone:
        assert str(error).startswith(f"{name}: Cannot connect to host 127.0.0.1:9")


def test_a_drive_that_is_gone_is_raised(tmp_path, monkeypatch):
    (tmp_path / "1.jpg").write_bytes(b"1")
    photos = list_table(tmp_path / "cars.csv", "1.jpg")

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(UnreachableError) as error:
        patch.setattr(os, "fstat", fail)
        list(photos.store.read_many(photos.names))
    assert str(error.value).startswith(f"{tmp_path}/1.jpg cannot be read for now: Input/output error; the same")


def test_large_photos_of_a_table_are_read_one_at_a_time(tmp_path, monkeypatch):
    names = [f"{number}.jpg" for number in range(20)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 100)
    photos = list_table(tmp_path / "cars.csv", *names, "gone.jpg")
    read, done, most = unlabelled.read_file, [], 0
    monkeypatch.setattr(unlabelled, "read_file", lambda path: done.append(path) or read(path))
    monkeypatch.setattr(unlabelled, "_BYTES_AHEAD", 1200)
    for number, (name, content) in enumerate(photos.store.read_many(photos.names), start=1):
        assert isinstance(content, FileNotFoundError) if name == "gone.jpg" else content == name.encode() * 100
        most = max(most, len(done) - number)
    assert most <= 3


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "simplecache::https://ada:s3cret@example.com/1.jpg",
            "simplecache::https://example.com/1.jpg: expected one URL, got several joined by ::",
        ),
        ("HTTPS://ada:s3cret@example.com/1.jpg", "HTTPS://example.com/1.jpg: expected a URL without a password, "),
        ("abfss://c@evil.example/1.jpg", "abfss://c@evil.example/1.jpg: expected a host of Azure's, such as "),
        ("az://evil.example/c/1.jpg", "az://evil.example/c/1.jpg: expected a host of Azure's, such as "),
        ("abfss://c@evil/1.jpg", "abfss://c@evil/1.jpg: expected a host of Azure's, such as "),
        (
            "abfss://c@evil.example:1.core.windows.net/1.jpg",
            "abfss://c@evil.example:1.core.windows.net/1.jpg: expected a",
        ),
        (
            "abfss://c@xcore.windows.net/1.jpg",
            "abfss://c@xcore.windows.net/1.jpg: expected a host of Azure's, such as ",
        ),
    ],
)
def test_urls_that_are_refused(url, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sig=s3cret")
    # Not only the first one of its kind.
    first = "abfss://c@one.dfs.core.windows.net/1.jpg"
    with pytest.raises(ValueError) as error:
        list_table(tmp_path / "cars.csv", first, url)
    assert str(error.value).startswith(f"photos: {tmp_path}/cars.csv, photo 2: {expected}")
    assert "s3cret" not in str(error.value)


def test_a_scheme_in_large_letters(web, tmp_path):
    photos = list_table(tmp_path / "cars.csv", f"{web}/1.jpg".replace("http", "HTTP"))
    assert [content for _, content in photos.store.read_many(photos.names)] == [b"/1.jpg"]


def test_relative_names_of_a_table_at_a_url(web):
    store = unlabelled.LinkedFiles(f"{web}/cars.csv", web, ["1.jpg", "x::2.jpg", "3.jpg?sig=s3cret"])
    (_, first), (_, second), (_, third) = store.read_many(store.names)
    assert (first, Unsteady.asked) == (b"/1.jpg", ["/1.jpg"])
    assert str(second) == f"{web}/x::2.jpg: expected one URL, got several joined by ::"
    assert str(third).startswith(f"{web}/3.jpg: expected a URL without a password, token or signature")


def test_a_table_among_the_artifacts_of_a_run(store, tmp_path):
    with mlflow.start_run() as run:
        mlflow.log_text("path\n/cars/1.jpg\n", "cars.csv")
    one, other = (list_photos(f"runs:/{run.info.run_id}/cars.csv") for _ in range(2))
    assert one.store.place == other.store.place == f"runs:/{run.info.run_id}/cars.csv"
    assert one.digest() == other.digest()


def test_a_relative_table_is_known_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cars.csv").write_text("path\n1.jpg\n")
    assert list_photos("cars.csv").store.place == f"{tmp_path}/cars.csv"
