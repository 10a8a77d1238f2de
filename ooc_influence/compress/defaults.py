"""What is kept of the gradients of Hugging Face models where the caller does not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ooc_influence.compress.compressor import Eigenbasis, KroneckerBasis
from ooc_influence.compress.dropout import Dropout
from ooc_influence.errors import InputError
from ooc_influence.linalg import is_token_loss
from ooc_influence.memory import parse_bytes
from ooc_influence.options import DampingScope
from ooc_influence.store import Encoding, Representation, parse_representation, transform_size

WIDE, REDUCED = 65536, 4096  # entries kept, and numbers they are reduced to
SCALE_BYTES = 4  # of a row's scale
LARGEST_STORE = 64 * 2**30  # bytes; rows of larger stores are reduced


# Gradients of an adapter's layers differ in size by orders of magnitude, and so do the dampings that suit its two uses:
# see docs/evaluation.md.
ADAPTER_BASIS = KroneckerBasis(damping=0.3, damping_scope="model", list_damping=3000.0)


def kronecker_basis(damping: float | None, scope: DampingScope | None, *, adapter: bool = False) -> KroneckerBasis:
    """Return a basis with its defaults, or those for an adapter, for what is None."""
    if adapter and damping is None and scope is None:
        return ADAPTER_BASIS
    asked: dict[str, Any] = {"damping": damping, "damping_scope": scope}
    return KroneckerBasis(**{name: value for name, value in asked.items() if value is not None})


REDUCED_BELOW = 3000  # bytes of a row: below, numbers of the eigenbasis of a wide mask are better than signs


@dataclass(frozen=True)
class RowBudget:
    """What to keep of each gradient for a number of bytes a row, as measured on language models.

    Signs of as many entries as there are bits; below :data:`REDUCED_BELOW` bytes, as many int8 numbers of the
    eigenbasis of 65,536 entries. Both are in the Kronecker basis. docs/howto/choose.md has the measurements.

    Parameters
    ----------
    row_bytes : int or str
        Bytes of a stored row with its scale, such as 8192 or ``"8kB"``; the loss, the norms and ids of a row are beside
        them.
    seed : int
        Of the choice of entries.
    basis : KroneckerBasis, optional
        Settings of the basis; default its own, or those for adapters where a Hugging Face model is one.

    Examples
    --------
    A compressor for :func:`extract_gradients`, which takes the representation beside it:

    >>> budget = RowBudget("8kB")
    >>> budget.dtype, budget.k, budget.r
    ('sign', 63488, None)
    >>> extract_gradients(model, loss, batches, "train.zarr", compressor=budget, dtype=budget.dtype)

    Raises
    ------
    InputError
        For less than 16 bytes.
    """

    row_bytes: int | str
    seed: int = 0
    basis: KroneckerBasis | None = None

    def __post_init__(self) -> None:
        if self.size < 16:
            raise InputError(f"expected at least 16 bytes a row; received {self.row_bytes!r}")

    @property
    def size(self) -> int:
        """The bytes, as a number."""
        return parse_bytes(self.row_bytes)

    @property
    def dtype(self) -> str:
        """The representation of the rows."""
        return "int8" if self.size < REDUCED_BELOW else "sign"

    @property
    def k(self) -> int:
        """Entries kept."""
        if self.size < REDUCED_BELOW:
            return WIDE
        bits = 8 * (self.size - SCALE_BYTES)
        return bits // transform_size(bits) * transform_size(bits)

    @property
    def r(self) -> int | None:
        """Numbers that they are reduced to; None for signs."""
        if self.size >= REDUCED_BELOW:
            return None
        numbers = self.size - SCALE_BYTES
        while Encoding.of("int8", numbers).row_bytes + SCALE_BYTES > self.size:
            numbers -= 1
        return numbers

    def __call__(self, p: int) -> Dropout:
        """Return the compressor for a model of p entries."""
        k, r = min(self.k, p), self.r
        reduction = None if r is None or r >= k else Eigenbasis(r)
        return Dropout(k=k, sampling="grid", seed=self.seed, reduce=reduction, basis=self.basis or KroneckerBasis())

    def for_adapter(self) -> RowBudget:
        """Return the same for the entries of an adapter, unless the basis was chosen."""
        return self if self.basis is not None else replace(self, basis=ADAPTER_BASIS)


@dataclass(frozen=True)
class DefaultDropout:
    """Dropout in the Kronecker basis for language models, by importance for others; reduced in stores beyond 64 GiB.

    A reduction to r directions keeps what the rows it is made from have in common; of few rows that says little about
    queries.

    Parameters
    ----------
    k : int, optional
        Entries kept; default 65536, or all where there are fewer.
    sampling : {"uniform", "importance", "grid"}, optional
        As for :class:`Dropout`; default a grid in a Kronecker basis, else by importance.
    basis : {"parameters", "kronecker"}, optional
        Whose entries are kept; default the Kronecker basis for language models, else the parameters' own coordinates.
    damping : float, optional
        Of a Kronecker basis; default 0.03, or 0.3 for an adapter (with ``damping_scope``).
    damping_scope : {"layer", "model"}, optional
        Of a Kronecker basis; default each layer, or the model for an adapter (with ``damping``).
    seed : int
        Of the choice.
    reduce : Eigenbasis or False, optional
        The reduction, or False for none; default one of 4096 numbers in a store that would exceed 64 GiB.
    """

    k: int | None = None
    sampling: Literal["uniform", "importance", "grid"] | None = None
    basis: Literal["parameters", "kronecker"] | None = None
    damping: float | None = None
    damping_scope: DampingScope | None = None
    seed: int = 0
    reduce: Eigenbasis | Literal[False] | None = None

    def sized(
        self, rows: int, dtype: str, loss_kind: str | None, *, adapter: bool = False
    ) -> Callable[[int], Dropout]:  # fmt: skip
        """Return what makes the compressor of a model's p entries, for a store of ``rows`` rows and their loss.

        ``adapter`` says that these are entries of an adapter to a model that is frozen.
        """
        basis = self.basis or ("kronecker" if is_token_loss(loss_kind) else "parameters")
        kronecker = None
        if basis == "kronecker":
            kronecker = kronecker_basis(self.damping, self.damping_scope, adapter=adapter)
        return partial(self._make, rows=rows, dtype=parse_representation(dtype), basis=kronecker)

    def _make(self, p: int, rows: int, dtype: Representation, basis: KroneckerBasis | None) -> Dropout:
        k = min(WIDE, p) if self.k is None else self.k
        reduction = self.reduce or None
        if self.reduce is None and rows * Encoding.of(dtype, k).row_bytes > LARGEST_STORE:
            reduction = Eigenbasis(r=min(REDUCED, k, max(1, rows // 2)))
        sampling = self.sampling or ("grid" if basis else "importance")
        return Dropout(k=k, sampling=sampling, seed=self.seed, reduce=reduction, basis=basis)
