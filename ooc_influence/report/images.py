"""Images of examples as PNG files in a page's folder: from arrays, or decoded from files and written anew.

Nothing is copied as it is: what a page shows was decoded by pillow, is a bitmap and at most :data:`LARGEST` a side. A
file says its size before it is decoded; one of more than :data:`PIXELS` is not (a kilobyte can hold a gigapixel).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, StoreWriteError, refused
from ooc_influence.progress import optional_library

LARGEST = 512  # pixels a side
PIXELS = 2**26  # of an image that is decoded
_TOO_LARGE = f"more than {PIXELS // 10**6} million pixels"
_RUN_A_PROGRAM = ("EPS", "WMF")  # Ghostscript, the system's own
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


class UnseenError(ValueError):
    """Why an image is not shown, in words for the page."""


class ImageFolder:
    """The images of one store in a page's folder. An image that cannot be shown is counted, and the page says why.

    Parameters
    ----------
    folder : Path
        The page's.
    name : str
        Of the folder of images within it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder / "images" / name, f"images/{name}"
        self._unseen: dict[int, str] = {}

    @property
    def unreadable(self) -> int:
        """Images that are not shown."""
        return len(self._unseen)

    def write(self, row: int, image: Any) -> dict[str, str]:
        """Write an array as the image of a row, once; return what an example says of it, see :meth:`copy`.

        Raises
        ------
        StoreWriteError
            If the system refuses.
        """
        library = optional_library("PIL.Image", "images")
        return self._put(row, lambda: _bitmap(np.asarray(image), library))

    def copy(self, row: int, root: Path, place: Any) -> dict[str, str]:
        """Write an image file below ``root`` as the image of a row.

        Returns
        -------
        dict
            ``image``, its path in the page; or ``unseen``, why there is none.

        Raises
        ------
        StoreWriteError
            If the system refuses.
        """
        library = optional_library("PIL.Image", "images")
        return self._put(row, lambda: _decoded(library, root, place))

    def _put(self, row: int, make: Callable[[], Any]) -> dict[str, str]:
        target = self._folder / f"{row}.png"
        if row in self._unseen:  # an example is on many pages
            return {"unseen": self._unseen[row]}
        if not target.exists():
            try:
                picture = make()
                picture.thumbnail((LARGEST, LARGEST))
            except Exception as error:  # whatever decoders raise: one bad file among thousands is no reason to stop
                said = str(error) if isinstance(error, UnseenError) else type(error).__name__
                self._unseen[row] = f"image not shown: {said}"
                return {"unseen": self._unseen[row]}
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                picture.save(target, "PNG")
            except OSError as error:
                raise StoreWriteError(refused(f"to write an image to {self._folder}", error)) from error
        return {"image": f"{self._name}/{row}.png"}


def _decoded(library: Any, root: Path, place: Any) -> Any:
    """Return the image in a file, decoded no larger than it has to be.

    Raises
    ------
    UnseenError
        If it is none, or not to be opened.
    Exception
        Whatever else its decoder raises.
    """
    path = (root / str(place)).resolve()
    if not path.is_relative_to(root.resolve()):  # a corpus names files: not any of the machine's
        raise UnseenError("not below the folder of the data")
    if not path.is_file():
        raise UnseenError("no such file")
    library.init()
    formats = [name for name in library.ID if name not in _RUN_A_PROGRAM]
    with warnings.catch_warnings():
        warnings.simplefilter("error", library.DecompressionBombWarning)
        try:
            opened = library.open(path, formats=formats)
        except (library.DecompressionBombError, library.DecompressionBombWarning) as error:
            raise UnseenError(_TOO_LARGE) from error
        except library.UnidentifiedImageError as error:
            raise UnseenError("no image that can be read") from error
    with opened as picture:
        picture.draft(None, (LARGEST, LARGEST))  # a JPEG is decoded at an eighth of its size, if that is enough
        if picture.width * picture.height > PIXELS:
            raise UnseenError(_TOO_LARGE)
        return picture.convert("RGBA")


def _bitmap(image: npt.NDArray[Any], library: Any) -> Any:
    if image.ndim == 3 and image.shape[2] not in _CHANNELS:
        image = np.moveaxis(image, 0, 2)  # channels first
    if image.shape[0] * image.shape[1] > PIXELS:
        raise UnseenError(_TOO_LARGE)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.dtype.kind == "f":
        finite = image[np.isfinite(image)]
        low, high = float(finite.min(initial=0)), float(finite.max(initial=1))
        image = np.nan_to_num((image.astype(np.float32) - low) / (high - low) * 255)
    pixels = np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))
    return library.fromarray(pixels)
