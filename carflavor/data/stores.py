"""The files of a dataset wherever they lie, read by name: in a folder, in an archive, or at a URL."""

import errno
import hashlib
import os
import re
import stat

from carflavor.data.archives import open_archive
from carflavor.data.failures import UnreachableError, raise_if_unreachable
from carflavor.data.locations import copy_here, is_artifact, local_path, resolve_input
from carflavor.data.remote import RemotePlace
from carflavor.data.urls import is_url

# What is read at once, into memory. A photo of 200 million pixels is a third of it.
MAX_READ_BYTES = 512_000_000
_STAMPED_FILES = 16
_ARCHIVE_ENDING = re.compile(r"\.(zip|tar|tgz|tar\.gz)$", re.IGNORECASE)
# What Windows, macOS and network drives leave beside photos; in small letters. Hidden files are left out anyway.
_CLUTTER = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "icon\r"}


class Store:
    """The files below a place.

    Args:
        place: A folder; a zip or tar archive, also compressed by gzip, which is read without being unpacked; or a URL
            that fsspec knows, such as `abfss://`, `az://`, `s3://` or `https://`, of either. An archive at a URL is
            copied to a temporary folder first, which goes with the process. `str` or `Path`.
        artifact: URI of the artifact of MLflow that was copied to this place, or None. It is what errors call it, and
            times of the copy count for nothing.

    Attributes:
        place: What errors call it; without credentials.
        name: Its last part, without an archive's ending.
        names: Tuple of relative posix names of all files, sorted; without hidden files and what systems leave behind.

    Pickles as what it found: a process that it is sent to opens the files anew, and lists nothing.

    Raises:
        ValueError: If nothing is there, or it is neither folder nor archive; if an archive is damaged, encrypted or
            holds links or names outside it; if a URL holds credentials or lacks its driver.
    """

    def __init__(self, place, artifact=None):
        place = str(place)
        if not place:
            raise ValueError("expected a path or URL, got an empty text")
        self._url = place if is_url(place) else None
        self._artifact = artifact
        try:
            self._find(place)
        except OSError as error:
            raise ValueError(str(error)) from None
        self.names = tuple(sorted(name for name in self._files.sizes if not _is_clutter(name)))
        # Record files hold names as UTF-8.
        if strange := [name for name in self.names if not _is_utf8(name)]:
            raise ValueError(f"{self.place}: expected file names in UTF-8, got {strange[0]!r}")

    def _find(self, place):
        self._archive = None
        if self._url:
            remote = RemotePlace(place)
            self.place, self.name, self._files = remote.place, remote.name, remote
            if remote.is_file:
                self._archive = copy_here(remote)
        else:
            path = os.path.abspath(local_path(place))
            self.place = self._artifact or path
            self.name = os.path.basename(self.place.rstrip("/")) or "photos"
            if os.path.isdir(path):
                self._files = _Folder(path)
            elif os.path.isfile(path):
                self._archive = path
            else:
                raise FileNotFoundError(f"{path} does not exist")
        if self._archive:
            self.name = _ARCHIVE_ENDING.sub("", self.name)
            self._files = open_archive(self._archive, self.place)

    def __setstate__(self, state):
        self.__dict__.update(state)
        # A copy may have gone, for instance with a process on another machine.
        if self._url and self._archive and not os.path.exists(self._archive):
            self.__init__(self._url)

    def __repr__(self):
        return f"Store({self.place!r})"

    @property
    def is_stream(self):
        """Whether files can only be read from the first to the last: one process then reads them for all others."""
        return self._files.is_stream

    @property
    def is_copy(self):
        """Whether it is an archive that was copied here from a URL: each process of another machine does it anew."""
        return bool(self._url and self._archive)

    def keep(self, is_wanted):
        """Leaves out of `names`, and so of `fingerprint` and `stamp`, what a function of a name says no to."""
        self.names = tuple(filter(is_wanted, self.names))

    def fingerprint(self):
        """Returns a SHA-256 (hex) that differs where a file was changed, as far as sizes and times tell."""
        sha256 = hashlib.sha256()
        if self._archive and not self._url and not self._artifact:
            sha256.update(str(os.stat(self._archive).st_mtime_ns).encode())
        stamp = self._files.stamp if isinstance(self._files, _Folder) else self._files.sizes.get
        if self._artifact and isinstance(self._files, _Folder):
            stamp = self._files.find_size
        for name in self.names:
            sha256.update(f"{name} {stamp(name)}\n".encode())
        return sha256.hexdigest()

    def stamp(self):
        """Returns what differs on a machine that sees other files or none there, as far as a few of them tell.

        Of a URL None: it is the same everywhere.
        """
        if self._url:
            return None
        names = self.names[:: max(1, len(self.names) // _STAMPED_FILES)]
        return stamp_file(self._archive) if self._archive else tuple(map(self._files.stamp, names))

    def open(self, name):
        """Returns a seekable binary file; a context manager.

        Raises:
            FileNotFoundError: If there is no such file.
            OSError: If it cannot be read, also while it is.
        """
        if not self._has(name):
            raise _no_file(f"{self.place}/{name}")
        return self._files.open(name)

    def read(self, name):
        """Returns the bytes of a file.

        Raises:
            FileNotFoundError: If there is no such file.
            OSError: If it cannot be read, or has more than `MAX_READ_BYTES`.
            UnreachableError: As `read_many` does.
        """
        _, content = next(self.read_many([name]))
        if isinstance(content, OSError):
            raise content
        return content

    def read_many(self, names):
        """Reads files in the order that is fastest, and each once.

        That is the order of the names, but for a compressed tar its own, for it is gone through once. From other
        machines several files are fetched at once, while those before them are worked on.

        Args:
            names: Iterable of names.

        Yields:
            (name, content), where content is bytes, or the OSError that `read` would raise.

        Raises:
            UnreachableError: If the drive or the network is at fault, not the file. One at a URL is tried again before.
        """
        readable = []
        for name in dict.fromkeys(names):
            error = self._refuse(name)
            if error:
                yield name, error
            else:
                readable.append(name)
        yield from self._files.read_many(readable)

    def _has(self, name):
        # Not in a set of the names, which every process that decodes would hold.
        return name in self._files.sizes and not _is_clutter(name)

    def _refuse(self, name):
        if not self._has(name):
            return _no_file(f"{self.place}/{name}")
        return _refuse_size(f"{self.place}/{name}", self._files.sizes[name] or 0)


def open_store(place, parameter):
    """Opens what a user names as source.

    Args:
        place: Whatever `resolve_input` takes. Files at a URL stay there until they are read.
        parameter: What the user calls it, for the error's first word.

    Returns:
        `Store`.

    Raises:
        ValueError: If nothing is there, or what is there is not what `Store` takes.
    """
    artifact = place if is_artifact(place) else None
    if artifact or not is_url(place):
        place = resolve_input(place, parameter)
    try:
        return Store(place, artifact)
    except ValueError as error:
        raise ValueError(f"{parameter}: {error}") from None


class _Folder:
    """A folder on this machine.

    Attributes:
        sizes: Dict of relative posix name to None, of all files: asking for sizes doubles the time of a listing.
    """

    is_stream = False

    def __init__(self, path):
        self._path = path
        self.sizes = dict.fromkeys(self._list(path, "", frozenset([os.path.realpath(path)])))

    def _list(self, path, prefix, above):
        with os.scandir(path) as entries:
            for entry in entries:
                # Here already, so that nothing below is listed: .git may hold more files than there are photos.
                if _is_clutter(entry.name):
                    continue
                if entry.is_file():
                    yield prefix + entry.name
                elif entry.is_dir() and (real := os.path.realpath(entry.path)) not in above:
                    # Links are followed, but not to a folder that they stand in.
                    yield from self._list(entry.path, f"{prefix}{entry.name}/", above | {real})

    def stamp(self, name):
        """Returns size and time of the last change, or None if it is gone since it was listed."""
        return stamp_file(os.path.join(self._path, name))

    def find_size(self, name):
        """Returns the bytes of a file, or None if it is gone."""
        return (self.stamp(name) or (None,))[0]

    def open(self, name):
        return open(os.path.join(self._path, name), "rb")

    def read_many(self, names):
        return ((name, self._read(name)) for name in names)

    def _read(self, name):
        try:
            return read_file(os.path.join(self._path, name))
        except UnreachableError:
            raise
        except OSError as error:
            return error


def read_file(path):
    """Returns the bytes of a file on this machine.

    Raises:
        OSError: If it cannot be read, is no file as devices and pipes are none, or has more than `MAX_READ_BYTES`.
        UnreachableError: If the drive that it lies on is at fault, or this machine is short of something.
    """
    try:
        # Before it is opened: a pipe would wait for a writer, and /dev/zero has no end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(f"{path}: expected a file, got a folder or a device")
        with open(path, "rb") as file:
            if too_large := _refuse_size(path, os.fstat(file.fileno()).st_size):
                raise too_large
            return file.read()
    except OSError as error:
        raise_if_unreachable(path, error)
        raise


def stamp_file(path):
    """Returns size and time of the last change of a file on this machine, or None where it is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # no path has a character of code 0
        return None
    return found.st_size, found.st_mtime_ns


def _no_file(what):
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), what)


def _refuse_size(what, num_bytes):
    if num_bytes > MAX_READ_BYTES:
        return OSError(f"{what}: expected at most {MAX_READ_BYTES / 1e6:.0f} MB, got {num_bytes / 1e6:.0f} MB")
    return None


def _is_clutter(name):
    return any(part.startswith(".") or part.lower() in _CLUTTER for part in name.split("/"))


def _is_utf8(name):
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
