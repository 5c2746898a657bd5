import shutil

import pytest

from carflavor.locking import lock


def test_lock_on_a_file_that_was_deleted_locks_nothing(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "lock"
    before = lock(path, "in use")
    opened = []

    def open_and_lose(*arguments):
        # Between the opening and the locking of the file its holder deletes it and ends.
        file = open(*arguments)
        if not opened:
            shutil.rmtree(tmp_path / "folder")
            before.close()
        opened.append(file)
        return file

    monkeypatch.setattr("carflavor.locking.open", open_and_lose, raising=False)
    with lock(path, "in use"):
        assert len(opened) == 2
        with pytest.raises(ValueError, match="in use"):
            lock(path, "in use")
