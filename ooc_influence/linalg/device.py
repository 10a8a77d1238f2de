"""Which device multiplies: a name that torch knows, checked without loading torch where none is asked for."""

from __future__ import annotations

from ooc_influence.errors import InputError, MissingExtraError


def parse_device(device: str | None) -> str | None:
    """Return the name of a torch device that is there; None for NumPy.

    Raises
    ------
    InputError
        If torch knows no such device, or it is not there.
    MissingExtraError
        If torch is not installed.
    """
    if device is None:
        return None
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(f"expected torch for device={device!r}; received none: pip install torch") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"expected a device such as 'cpu' or 'cuda'; received {device!r} ({reason}): choose another"
        ) from error
    return str(device)
