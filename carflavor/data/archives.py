"""Zip and tar archives, read where they are. They may come from strangers, and nothing is unpacked under its name.

A tar that is not compressed is read at the place of each file; one that is can only be read from its start.
"""

import gzip
import io
import os
import re
import stat
import tarfile
import zipfile
from pathlib import Path

from carflavor.data.failures import raise_if_unreachable
from carflavor.progress import bytes_bar

# Photos hardly shrink, tables tenfold. A gzip of zeros shrinks a thousandfold, and going through it takes hours.
_MAX_RATIO = 100
_BEARABLE_BYTES = 1_000_000_000
_MAX_MEMBERS = 2_000_000
# tarfile takes what extends a header, long names for one, into memory whole.
_MAX_TAR_HEADER = 1_000_000
_FROM_DOS, _FROM_UNIX = 0, 3
_ENCRYPTED = 0x1


def open_archive(path, place):
    """Opens an archive as what it is by its content, whatever its name is.

    Args:
        path: Path of the file.
        place: What errors call it.

    Returns:
        `Zip` or `Tar`.

    Raises:
        ValueError: If it is no such archive, is damaged, or holds what no archive of photos does.
        OSError: If the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"PK"):
        return Zip(path, place)
    if head.startswith(b"\x1f\x8b"):
        return Tar(path, place, compressed=True)
    if _is_tar(head):
        return Tar(path, place, compressed=False)
    raise ValueError(
        f"{place}: expected a folder or a .zip, .tar, .tgz or .tar.gz archive, got a file that begins with "
        f"{head[:16]!r}"
    )


class Zip:
    """A zip archive. Pickles as its path and directory, and opens anew.

    Attributes:
        sizes: Dict of relative posix name to bytes, as the archive's directory says, of all files.
    """

    is_stream = False

    def __init__(self, path, place):
        self._path, self._place = path, place
        self._opened, self._process = None, None
        try:
            members = self._archive().infolist()
            self._members = dict(self._check(members))
        except (OSError, _RefusedError):
            raise
        except Exception as error:
            # Of a damaged directory zipfile raises much, struct.error, UnicodeDecodeError and OverflowError among it.
            raise _damaged(place, error) from None
        self.sizes = {name: member.file_size for name, member in self._members.items()}

    def _check(self, members):
        if len(members) > _MAX_MEMBERS:
            raise _RefusedError(f"{self._place}: expected at most {_MAX_MEMBERS} files, got {len(members)}")
        _refuse_bomb(self._place, sum(member.file_size for member in members), os.path.getsize(self._path))
        for member in members:
            name = member.filename
            # Old Windows programs write backslashes.
            if member.create_system == _FROM_DOS and "/" not in name:
                name = name.replace("\\", "/")
            is_folder = name.endswith("/")
            name = _clean_name(name, self._place)
            mode = member.external_attr >> 16
            if member.create_system == _FROM_UNIX and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _no_file(self._place, name, stat.S_ISLNK(mode))
            if is_folder:
                continue
            if member.flag_bits & _ENCRYPTED:
                raise _RefusedError(f"{self._place}: expected an archive without a password, got {name!r} encrypted")
            # bzip2 and LZMA are unpacked by zipfile without a limit, and hardly anybody uses them here.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _RefusedError(
                    f"{self._place}: expected files that are stored or deflated, got {name!r} compressed by method "
                    f"{member.compress_type}"
                )
            yield name, member

    def __getstate__(self):
        return {**self.__dict__, "_opened": None}

    def _archive(self):
        # After a fork, parent and child would move one and the same position in the file.
        if self._opened is None or self._process != os.getpid():
            self._opened, self._process = zipfile.ZipFile(self._path), os.getpid()
        return self._opened

    def open(self, name):
        """Returns a seekable binary file; a context manager. Going back means unpacking from the file's start."""
        member, what = self._members[name], f"{self._place}/{name}"
        try:
            file = self._archive().open(member)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{what} is damaged: {error}") from None
        return io.BufferedReader(_Part(file, 0, member.file_size, what))

    def read_many(self, names):
        """Yields (name, bytes or OSError) in the order of the names."""
        return ((name, _read_or_error(self.open, name, self._place)) for name in names)


class Tar:
    """A tar archive, as it is or compressed by gzip. Pickles as its path and the places of its files.

    A compressed one is gone through once to list it.

    Attributes:
        sizes: Dict of relative posix name to bytes of all files.
        is_stream: Whether it is compressed.
    """

    def __init__(self, path, place, compressed):
        self._path, self._place, self.is_stream = path, place, compressed
        with open(path, "rb") as raw, bytes_bar(f"list {Path(path).name}", os.path.getsize(path)) as bar:
            try:
                # Of a name that is there twice the later one counts, as in unpacking.
                found = dict(self._list(gzip.GzipFile(fileobj=raw) if compressed else raw, raw, bar))
            except _RefusedError:
                raise
            except Exception as error:
                # EOFError where it is cut off, zlib.error, and whatever tarfile makes of a damaged header.
                raise _damaged(place, error) from None
        self._starts = {name: start for name, (start, _) in found.items()}
        self.sizes = {name: size for name, (_, size) in found.items()}

    def _list(self, stream, raw, bar):
        num_bytes, end, num_members = os.path.getsize(self._path), 0, 0
        guard = _HeaderGuard(stream)
        archive = tarfile.TarFile(fileobj=guard)
        while (member := archive.next()) is not None:
            # It would keep them all, a kilobyte of memory each.
            archive.members.clear()
            num_members += 1
            if num_members > _MAX_MEMBERS:
                raise _RefusedError(f"{self._place}: expected at most {_MAX_MEMBERS} files, got more")
            # By a size below zero tarfile goes back, and round in a circle.
            if member.size < 0 or member.offset_data < end:
                raise tarfile.ReadError(f"{member.name!r} of {member.size} bytes")
            name = _clean_name(member.name, self._place)
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise _no_file(self._place, name, member.issym() or member.islnk())
            if member.isreg():
                end = member.offset_data + member.size
                _refuse_bomb(self._place, end, num_bytes)
                yield name, (member.offset_data, member.size)
            bar.update(raw.tell() - bar.n)
        # tarfile takes a broken header for the end.
        guard.seek(archive.offset)
        if guard.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {archive.offset}")

    def _open_stream(self):
        return gzip.open(self._path) if self.is_stream else open(self._path, "rb")

    def open(self, name):
        """Returns a seekable binary file; a context manager. A compressed archive is unpacked up to its place."""
        return self._part(self._open_stream(), name)

    def _part(self, stream, name, closes=True):
        part = _Part(stream, self._starts[name], self.sizes[name], f"{self._place}/{name}", closes)
        return io.BufferedReader(part)

    def read_many(self, names):
        """Yields (name, bytes or OSError): in the order of the names, or of a compressed archive, in one pass."""
        if not self.is_stream:
            for name in names:
                yield name, _read_or_error(self.open, name, self._place)
            return
        with self._open_stream() as stream:
            for name in sorted(names, key=self._starts.__getitem__):
                yield name, _read_or_error(lambda name: self._part(stream, name, closes=False), name, self._place)


class _RefusedError(ValueError):
    """What is well-formed and still not read."""


class _Part(io.RawIOBase):
    """A stretch of a file as a file of its own, which asks for no more than is read of it."""

    def __init__(self, file, start, size, what, closes=True):
        self._file, self._start, self._size, self._what, self._closes = file, start, size, what, closes
        self._position = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise ValueError(f"Expected a position from 0. Received: {position}")
        self._position = position
        return position

    def readinto(self, buffer):
        data = self._read(min(len(buffer), self._size - self._position))
        buffer[: len(data)] = data
        return len(data)

    def readall(self):
        # By itself RawIOBase reads 8 kB at a time.
        return self._read(self._size - self._position)

    def _read(self, num_bytes):
        if num_bytes <= 0:
            return b""
        try:
            self._file.seek(self._start + self._position)
            # With a number, always: without one zipfile unpacks all there is, whatever size the directory says.
            data = self._file.read(num_bytes)
        except Exception as error:
            raise_if_unreachable(self._what, error)
            raise OSError(f"{self._what} is damaged: {error}") from None
        if len(data) < num_bytes:
            raise OSError(f"{self._what} is cut off: expected {self._size} bytes, got {self._position + len(data)}")
        self._position += len(data)
        return data

    def close(self):
        if self._closes:
            self._file.close()
        super().close()


class _HeaderGuard:
    """The file that tarfile reads headers from, without those that would fill the memory."""

    def __init__(self, file):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, num_bytes):
        if not 0 <= num_bytes <= _MAX_TAR_HEADER:
            raise tarfile.ReadError(f"a header of {num_bytes} bytes")
        return self._file.read(num_bytes)


def _read_or_error(open_file, name, place):
    try:
        with open_file(name) as file:
            return file.read()
    except OSError as error:
        raise_if_unreachable(f"{place}/{name}", error)
        return error


def _is_tar(head):
    # An empty archive is zeros from the start. Otherwise the header's checksum tells a tar, also one without a magic.
    if head == bytes(tarfile.BLOCKSIZE):
        return True
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _clean_name(name, place):
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:[/\\]", name):
        raise _RefusedError(f"{place}: expected names below one folder, got {name!r}")
    return "/".join(part for part in parts if part not in ("", "."))


def _no_file(place, name, is_link):
    kind = "the link" if is_link else "the device or special file"
    return _RefusedError(f"{place}: expected plain files and folders, got {kind} {name!r}")


def _refuse_bomb(place, unpacked, packed):
    if unpacked > max(_BEARABLE_BYTES, _MAX_RATIO * packed):
        raise _RefusedError(
            f"{place}: expected an archive of photos, got one of {packed / 1e6:.1f} MB that unpacks to more than "
            f"{max(_BEARABLE_BYTES, _MAX_RATIO * packed) / 1e9:.0f} GB"
        )


def _damaged(place, error):
    return ValueError(f"{place}: expected a whole archive, got one that is cut off or damaged: {error}")
