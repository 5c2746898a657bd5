"""What a user names as `source`: somebody's photos, or the embedded sample."""

import hashlib
import logging

from carflavor.data import sample
from carflavor.data.locations import data_home
from carflavor.data.stores import Store, open_store
from carflavor.version import __version__

# What people type for it.
_SAMPLE = "sample"
# How files call their source when it is the sample; no folder's name, as somebody's folder may be called sample.
EMBEDDED_SAMPLE = "embedded sample"

_logger = logging.getLogger(__name__)


def open_source(source):
    """Opens the photos that a user names.

    Args:
        source: Whatever `carflavor.data.stores.open_store` takes, or `sample`, whose photos are drawn the first time.

    Returns:
        `Store`.

    Raises:
        ValueError: If nothing is there, or what is there is not what `Store` takes.
    """
    return Store(_sample_photos()) if source == _SAMPLE else open_store(source, "source")


def name_source(source, store):
    """Returns what files call their source: the name alone, for the same photos in another place are the same data."""
    return EMBEDDED_SAMPLE if source == _SAMPLE else store.name


def default_out(folder, source, store):
    """Returns the `Path` of what is made of a source, in a folder of `data_home()`, where its user names no other."""
    # Two folders of one name in different places must not write over each other.
    place = hashlib.sha256(store.place.encode()).hexdigest()[:8]
    return data_home() / folder / ("sample" if source == _SAMPLE else f"{store.name}-{place}")


def _sample_photos():
    folder = data_home() / f"sample-{__version__}" / "photos"
    if not folder.is_dir():
        _logger.info("Drawing the embedded sample in %s", folder)
        try:
            sample.write_sample(folder)
        except OSError:
            # Two first runs at once: the other one was quicker.
            if not folder.is_dir():
                raise
    return folder
