"""Small pictures of a dataset's photos, for reports."""

import contextlib

import cv2

from carflavor.data.failures import UnreachableError
from carflavor.data.layouts import Photo, PhotoReader
from carflavor.image import EncodedPhoto

_SIDE = 288  # pixels of the longer side: two inches of a figure
_SCALES = (8, 4, 2)  # to which a JPEG is decoded at once


def read_thumbnails(store, names, photos=()):
    """Reads photos and scales them down, one after the other.

    Args:
        store: `carflavor.data.stores.Store`.
        names: Set of names of photos, or of files in the store.
        photos: List of the `carflavor.data.layouts.Photo` that some of these names are of.

    Returns:
        Dict of name -> uint8 RGB array whose longer side has at most 288 pixels, without those that cannot be read.
    """
    photos = [photo for photo in photos if photo.name in names]
    others = names - {photo.name for photo in photos}
    photos += [Photo(name, file=name, row=None, label=-1, box=None) for name in sorted(others)]
    thumbnails = {}
    # What is unreachable now was read before: reports do without it.
    with contextlib.suppress(UnreachableError), PhotoReader(store) as reader:
        for photo, data in reader.read_many(photos):
            if isinstance(data, Exception):
                continue
            try:
                thumbnails[photo.name] = _shrink(EncodedPhoto(data))
            except ValueError:
                continue
    return thumbnails


def _shrink(encoded):
    longer = max(encoded.width, encoded.height)
    scale = next((scale for scale in _SCALES if encoded.format == "JPEG" and longer >= scale * _SIDE), 1)
    pixels = encoded.decode(scale)
    height, width = pixels.shape[:2]
    factor = _SIDE / max(height, width)
    if factor >= 1:
        return pixels
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
