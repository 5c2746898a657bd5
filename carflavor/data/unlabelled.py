"""Photos that need no labels, to be scored: those below a place, or those that a table names."""

import hashlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from carflavor.data import remote
from carflavor.data.failures import UnreachableError
from carflavor.data.layouts.columns import read_box
from carflavor.data.layouts.dataset import is_photo, list_top, shorten
from carflavor.data.layouts.tables import read_header, read_values
from carflavor.data.locations import is_artifact, local_path, resolve_input
from carflavor.data.sources import open_source
from carflavor.data.stores import Store, open_store, read_file, stamp_file
from carflavor.data.urls import is_url, normalise_url, shown

_TABLES = (".csv", ".tsv", ".parquet")
# Fetched while those before them are worked on. Of URLs no size is known before.
_PHOTOS_AHEAD, _BYTES_AHEAD = 16, 128_000_000
_STAMPED_FILES = 16


class LinkedFiles:
    """The files that a table names by paths and URLs, which may lie anywhere; to readers what a `Store` is.

    Args:
        place: Path or URL of the table, which errors call it by.
        base: Folder or URL that relative paths start from.
        names: Paths and URLs as the table has them.

    Attributes:
        place: As given.
        name: Its last part without an ending, see `Store`.
        names: Tuple of the names, each once.
        is_stream, is_copy: False, see `Store`.
    """

    is_stream = is_copy = False

    def __init__(self, place, base, names):
        self.place = place
        self.name = PurePosixPath(place).stem
        self._base = base
        self.names = tuple(dict.fromkeys(names))

    def fingerprint(self):
        """Returns a SHA-256 (hex) that differs where a file of this machine was changed, as `Store` does."""
        # Not of the base: that of an artifact is another folder each time.
        sha256 = hashlib.sha256(self.place.encode())
        for name in self.names:
            sha256.update(f"{name} {self._stamp(name)}\n".encode())
        return sha256.hexdigest()

    def stamp(self):
        """Returns what differs on a machine that sees other files or none there, as `Store` does."""
        return tuple(map(self._stamp, self.names[:: max(1, len(self.names) // _STAMPED_FILES)]))

    def read_many(self, names):
        """Yields (name, bytes or OSError) in the order of the names, fetching several at once.

        One server of many must not hold up what the others have: what cannot be fetched from it is an error, too.

        Raises:
            UnreachableError: If a drive of this machine is at fault, not the file.
        """
        ahead, num_bytes, silent = deque(), 0, set()
        with ThreadPoolExecutor(_PHOTOS_AHEAD) as executor:
            for name in names:
                size = (self._stamp(name) or (0,))[0]
                while ahead and (len(ahead) == _PHOTOS_AHEAD or num_bytes + size > _BYTES_AHEAD):
                    first, first_size, future = ahead.popleft()
                    num_bytes -= first_size
                    yield first, future.result()
                ahead.append((name, size, executor.submit(self._read, name, silent)))
                num_bytes += size
            for name, _, future in ahead:
                yield name, future.result()

    def _find(self, name):
        """Returns the URL, or the `Path`."""
        if is_url(name):
            return name
        # Not what a shell makes of it: `~backup.jpg` is a file.
        path = local_path(name) if name.startswith("file:") else Path(name)
        if path.is_absolute():
            return path
        return f"{self._base}/{name}" if is_url(self._base) else Path(self._base) / path

    def _stamp(self, name):
        try:
            found = self._find(name)
        except ValueError:
            return None
        return None if isinstance(found, str) else stamp_file(found)

    def _read(self, name, silent):
        try:
            found = self._find(name)
            return remote.read_url(found, silent) if isinstance(found, str) else read_file(found)
        except UnreachableError:
            raise
        except OSError as error:
            return error
        except ValueError as error:
            # No system has such a path: with a character of code 0, say. The other photos are read all the same.
            return OSError(f"expected a path or URL, got {name!r}: {error}")


@dataclass(frozen=True)
class PhotoList:
    """Photos in their order, a row each.

    Attributes:
        store: What reads them: `Store` or `LinkedFiles`.
        names: Tuple of their names in it; of a table one may be there several times, with different boxes.
        boxes: Tuple of `(x1, y1, x2, y2)`, 0-based half-open, in pixels, or None, a row each; None where there is no
            column for them.
    """

    store: Store | LinkedFiles
    names: tuple
    boxes: tuple | None = None

    def digest(self):
        """Returns a SHA-256 (hex) that differs where a photo, its place in the order or its box does."""
        sha256 = hashlib.sha256(self.store.fingerprint().encode())
        for row, name in enumerate(self.names):
            sha256.update(f"{name} {self.boxes and self.boxes[row]}\n".encode())
        return sha256.hexdigest()


def list_photos(place):
    """Lists the photos that a user names; none is read.

    Args:
        place: `sample`; whatever `carflavor.data.stores.open_store` takes, whose files are photos by their endings, in
            folders of any depth; or a table, CSV with a header or Parquet, at a path or URL, with a column of paths and
            URLs and perhaps a box. Relative paths start from the folder of the table.

    Returns:
        `PhotoList` with at least one photo.

    Raises:
        ValueError: If there are none, the table has no such column or a box that is none, or a URL in it holds
            credentials or lacks its driver.
    """
    if PurePosixPath(shown(place)).suffix.lower() in _TABLES:
        return _list_table(place)
    store = open_source(place) if place == "sample" else open_store(place, "photos")
    if store.is_stream:
        raise ValueError(
            f"photos: expected photos that can be read at any place, got {store.place}, which can only be read from "
            f"its start to its end; unpack it, or pack it anew as .tar or .zip"
        )
    if not any(map(is_photo, store.names)):
        raise ValueError(f"photos: expected photos in {store.place}, got {list_top(store)}")
    # What lies beside them may change meanwhile: a log, or what is written to `out`.
    store.keep(is_photo)
    return PhotoList(store, store.names)


def _list_table(place):
    path, where = resolve_input(place, "photos"), f"photos: {shown(place)}"
    file, names = _TableFile(path.parent), [path.name]
    if path.is_dir():
        # Spark writes tables as folders of files.
        file, names = _TableFile(path), sorted(part.name for part in path.glob("[!._]*.parquet"))
        if not names:
            raise ValueError(f"{where}: expected a table, or a folder of Parquet files, got a folder with none")
    base = place.rstrip("/").rpartition("/")[0] if is_url(place) else str(path.parent)
    rows, has_boxes = [], False
    for name in names:
        table, values = _read_table(file, name)
        if table is None or table.columns.path is None:
            found = shorten(table.header) if table else "none of texts"
            raise ValueError(f"{where}: expected a column such as path or url, got {found}")
        has_boxes |= bool(table.columns.corners or table.columns.box)
        part = f"{where}/{name}" if path.is_dir() else where
        rows += [_read_row(table.columns, row, f"{part}, row {number}") for number, row in values]
    if not rows:
        raise ValueError(f"{where}: expected at least one photo, got none")
    photos, boxes = zip(*rows, strict=True)
    _check_urls(photos, where)
    place = shown(place) if is_url(place) or is_artifact(place) else str(path)
    return PhotoList(LinkedFiles(place, base, photos), photos, boxes if has_boxes else None)


def _read_table(file, name):
    """Returns the `Table`, or None, and its rows."""
    try:
        table = read_header(file, name, labels=False)
        return table, read_values(file, table) if table and table.columns.path else []
    except ValueError as error:
        raise ValueError(f"photos: {error}") from None


def _read_row(columns, values, where):
    name = str(values[columns.path] or "").strip()
    if not name:
        raise ValueError(f"{where}: expected the path or URL of a photo, got none")
    # One whose corners are not in order is refused when it is cut out: an error of this photo alone.
    box, _ = read_box(columns, values, where)
    return name, box


def _check_urls(names, where):
    hosts = set()
    for row, name in enumerate(names, start=1):
        if is_url(name):
            try:
                url = normalise_url(name)
                # What is the same for all of a host; a table may name millions.
                if (host := tuple(url.split("/")[:3])) not in hosts:
                    remote.check_url(url)
                    hosts.add(host)
            except ValueError as error:
                raise ValueError(f"{where}, photo {row}: {error}") from None


class _TableFile:
    """A folder as readers of tables take it, in which nothing is listed: a table may lie beside whatever there is."""

    def __init__(self, folder):
        self.place = str(folder)

    def open(self, name):
        return open(os.path.join(self.place, name), "rb")

    def read(self, name):
        with self.open(name) as file:
            return file.read()
