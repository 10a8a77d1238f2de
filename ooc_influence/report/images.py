"""Images of examples as PNG files in a page's folder: from arrays, or decoded from files and written anew.

Nothing is copied as it is: what a page shows was decoded by pillow, is a bitmap and at most :data:`LARGEST` a side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.notebook import optional_library

LARGEST = 512  # pixels a side
_CHANNELS = (1, 3, 4)


def open_images(images: Any, n: int) -> Any:
    """Return images by row, mapped where they are in a ``.npy`` file; None where there are none.

    Raises
    ------
    InputError
        If they are no array (n, h, w) or (n, h, w, c), or of another number of rows.
    """
    if images is None:
        return None
    found = images
    if isinstance(images, (str, Path)):
        try:
            found = np.load(images, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"expected images as a .npy file; received {images}: {error}") from error
    shape = np.shape(found)
    if len(shape) not in (3, 4) or shape[0] != n or (len(shape) == 4 and not {shape[1], shape[3]} & set(_CHANNELS)):
        raise InputError(f"expected images ({n}, h, w) or ({n}, h, w, 1, 3 or 4); received shape {shape}")
    return found


class ImageFolder:
    """The images of one store in a page's folder.

    Parameters
    ----------
    folder : Path
        The page's.
    name : str
        Of the folder of images within it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder / "images" / name, f"images/{name}"
        self.unreadable = 0

    def write(self, row: int, image: Any) -> str:
        """Write an array as the image of a row, once; return its path in the page."""
        return self._put(row, lambda: _bitmap(np.asarray(image)))

    def copy(self, row: int, root: Path, place: Any) -> str | None:
        """Write an image file below ``root`` as the image of a row; None, and counted, if there is none."""
        path = (root / str(place)).resolve()
        if not path.is_relative_to(root.resolve()):  # a corpus names files: not any of the machine's
            self.unreadable += 1
            return None
        try:
            return self._put(row, lambda: optional_library("PIL.Image", "images").open(path).convert("RGBA"))
        except (OSError, ValueError, SyntaxError):
            self.unreadable += 1
            return None

    def _put(self, row: int, make: Any) -> str:
        target = self._folder / f"{row}.png"
        if not target.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            picture = make()
            picture.thumbnail((LARGEST, LARGEST))
            picture.save(target, "PNG")
        return f"{self._name}/{row}.png"


def _bitmap(image: npt.NDArray[Any]) -> Any:
    if image.ndim == 3 and image.shape[2] not in _CHANNELS:
        image = np.moveaxis(image, 0, 2)  # channels first
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.dtype.kind == "f":
        low, high = min(0.0, float(np.nanmin(image))), max(1.0, float(np.nanmax(image)))
        image = np.nan_to_num((image - low) / (high - low) * 255)
    pixels = np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))
    return optional_library("PIL.Image", "images").fromarray(pixels)
