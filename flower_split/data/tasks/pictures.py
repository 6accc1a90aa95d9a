"""Pictures in records: read once to know what they are, decoded anew for every batch."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flower_split.data.documents import Record
from flower_split.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Stored = Path | bytes
"""An image file, or what it holds."""


def read_picture(value: object, record: Record, field: str) -> tuple[Stored, str]:
    """Return a record's picture as it is stored, and a digest of what the file holds.

    Args:
        value: What the record has: a path, the bytes of an image file, or either as datasets stores them.
        record: Names the folder where paths begin.
        field: The field's name, for messages.

    Raises:
        DataError: It is none of these, or the file cannot be read.
    """
    stored = _stored(value, record)
    content = stored
    if isinstance(stored, Path):
        try:
            content = stored.read_bytes()
        except OSError as error:
            raise DataError(
                f"{record.place}: the image {stored} cannot be read: {error.strerror}. A path in "
                f"{field!r} begins at the folder of the file that holds the record, unless it is absolute. "
                "Correct it."
            ) from error
    assert isinstance(content, bytes)
    return stored, hashlib.sha256(content).hexdigest()


def decode(stored: Stored) -> "Image":
    """Return a picture in RGB.

    Raises:
        OSError: It is gone, or is no picture.
    """
    from PIL import Image  # of the extra "images"

    given = stored if isinstance(stored, Path) else io.BytesIO(stored)
    with Image.open(given) as image:
        return image.convert("RGB")


def undecodable(place: str, error: Exception) -> DataError:
    """Return what is said of a picture that cannot be decoded."""
    return DataError(
        f"{place}: the image cannot be decoded: {error}. Correct or remove the record, or set "
        'data.on-bad-record = "skip".'
    )


def _stored(value: object, record: Record) -> Stored:
    """Return a picture's bytes, or its path.

    Raises:
        DataError: The field holds neither.
    """
    if isinstance(value, Mapping):  # as datasets stores images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value:
        return Path(record.folder, value).expanduser()
    raise DataError(
        f"{record.place}: an image must be a path, or the bytes of an image file; it is {value!r:.60}. "
        "Correct the record or data.image-field."
    )
