"""Parquet files, and the photos inside them."""

import contextlib

import pyarrow as pa
import pyarrow.parquet as pq

from carflavor.data.failures import raise_if_unreachable
from carflavor.data.layouts.columns import find_columns

# Photos of a few MB each: those of a whole row group, hundreds or thousands, may be more than memory holds.
_PHOTOS_AT_ONCE = 16


@contextlib.contextmanager
def open_parquet(store, name):
    """Opens a Parquet file in a store as `pyarrow.parquet.ParquetFile`.

    Raises:
        ValueError: If it is none, or its content cannot be read inside the `with` block.
    """
    with store.open(name) as file:
        try:
            # Photos are read as they are asked for, not a row group at a time.
            yield pq.ParquetFile(file, pre_buffer=False)
        # pyarrow says by OSError that bytes inside a column are damaged.
        except (pa.ArrowException, OSError) as error:
            raise_if_unreachable(f"{store.place}/{name}", error)
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{store.place}/{name}: expected a Parquet file, got one that pyarrow cannot read: {reason}"
            ) from None


def find_image_column(schema, where):
    """Returns the name of the column that holds the bytes of photos, or None.

    Such a column is a struct of `bytes` and `path`, as Hugging Face writes it, or plain bytes.
    """
    name = find_columns(schema.names, where, images=True).path
    if name is None:
        return None
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        return name if kind.get_field_index("bytes") >= 0 else None
    return name if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


class ParquetPhotos:
    """The photos in a Parquet file. Rows are quickly read one after the other; going back starts their row group anew.

    Args:
        store: `Store`.
        name: Name of the file in it.
    """

    def __init__(self, store, name):
        self._where = f"{store.place}/{name}"
        self._stack = contextlib.ExitStack()
        self._table = self._stack.enter_context(open_parquet(store, name))
        self._column = find_image_column(self._table.schema_arrow, self._where)
        sizes = [self._table.metadata.row_group(group).num_rows for group in range(self._table.num_row_groups)]
        self._ends = [sum(sizes[: group + 1]) for group in range(len(sizes))]
        self._group, self._batches, self._start, self._photos = None, None, 0, []

    def read(self, row):
        """Returns the bytes of the photo in a row, counted from 0.

        Raises:
            ValueError: If the row has none, or the file is damaged.
        """
        try:
            self._go_to(row)
        except (pa.ArrowException, OSError) as error:
            raise_if_unreachable(self._where, error)
            reason = str(error).partition("\n")[0]
            raise ValueError(f"expected the bytes of a photo, got some that pyarrow cannot read: {reason}") from None
        photo = self._photos[row - self._start].as_py()
        data = photo["bytes"] if isinstance(photo, dict) else photo
        if not data:
            raise ValueError("expected the bytes of a photo, got none")
        return data

    def close(self):
        self._stack.close()

    def _go_to(self, row):
        group = next(group for group, end in enumerate(self._ends) if row < end)
        if group != self._group or row < self._start:
            self._group, self._photos = group, []
            self._start = self._ends[group - 1] if group else 0
            self._batches = self._table.iter_batches(_PHOTOS_AT_ONCE, row_groups=[group], columns=[self._column])
        while row >= self._start + len(self._photos):
            self._start += len(self._photos)
            self._photos = next(self._batches).column(0)
