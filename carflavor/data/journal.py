"""What a long step has done so far, in a file that outlives it: a line of JSON an entry."""

import json
import os
from pathlib import Path


class Journal:
    """Entries that are on the way to the disk when `add` returns; a context manager.

    What was killed in the middle of a line leaves a line without an end, which is not read again.

    Args:
        path: Path of the file.
        key: What the work is, for JSON: entries of other work are thrown away.

    Attributes:
        entries: List of the entries so far.
        is_other: Whether what was there was of other work.
    """

    def __init__(self, path, key):
        self.path = Path(path)
        self._key = key
        self.entries, size, known = [], 0, None
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                size += len(line)
                if known is None:
                    known = entry
                else:
                    self.entries.append(entry)
        self.is_other = known is not None and known != json.loads(json.dumps(key))
        if known is None or self.is_other:
            self.entries, size = [], 0
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._file, size)
        os.lseek(self._file, 0, os.SEEK_END)
        if not size:
            self.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Closes the file."""
        os.close(self._file)

    def clear(self):
        """Throws all entries away."""
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        self.entries = []
        self._write([self._key])

    def add(self, entries):
        """Notes a list of entries, for JSON."""
        self._write(entries)
        self.entries += entries

    def _write(self, entries):
        # In one go and without a buffer of ours: what is written is the kernel's, whatever becomes of this process.
        data = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
        while data:
            data = data[os.write(self._file, data) :]
