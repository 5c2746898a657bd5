"""The bytes of a dataset's photos, whether files of their own or inside tables."""

from carflavor.data.failures import raise_if_unreachable
from carflavor.data.layouts.dataset import is_tfrecord
from carflavor.data.layouts.parquet import ParquetPhotos


class PhotoReader:
    """Reads the encoded photos of a dataset; quickest in their order. Leaves the last table open until it is closed.

    Args:
        store: `Store` that the dataset was read from.
    """

    def __init__(self, store):
        self._store = store
        self._name, self._table = None, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def read(self, photo):
        """Returns the bytes of a `Photo`.

        Raises:
            FileNotFoundError: If its file is not in the store.
            ValueError: If the table that it is in has none or is damaged.
        """
        if photo.row is None:
            return self._store.read(photo.file)
        if photo.file != self._name:
            self.close()
            self._table, self._name = _open_table(self._store, photo.file), photo.file
        return self._table.read(photo.row)

    def read_many(self, photos):
        """Reads photos in the order that is fastest for the store.

        Args:
            photos: List of `Photo`.

        Yields:
            Pairs of `Photo` and its bytes, or the ValueError or OSError that `read` would raise.

        Raises:
            UnreachableError: If the drive or the network is at fault, not the photo.
        """
        by_file = {}
        for photo in photos:
            if photo.row is None:
                by_file.setdefault(photo.file, []).append(photo)
        for name, content in self._store.read_many(by_file):
            for photo in by_file[name]:
                yield photo, content
        for photo in photos:
            if photo.row is not None:
                try:
                    yield photo, self.read(photo)
                except (ValueError, OSError) as error:
                    raise_if_unreachable(f"{self._store.place}/{photo.file}", error)
                    yield photo, error

    def close(self):
        if self._table:
            self._table.close()
        self._name, self._table = None, None


def read_photo(store, photo):
    """Returns the bytes of one `Photo`; many are read by a `PhotoReader`, which does not open their table each time."""
    with PhotoReader(store) as reader:
        return reader.read(photo)


def _open_table(store, name):
    if is_tfrecord(name):
        # Not at the top of the file: it loads TensorFlow, which no other layout needs.
        from carflavor.data.layouts.tfrecords import TFRecordPhotos

        return TFRecordPhotos(store, name)
    return ParquetPhotos(store, name)
