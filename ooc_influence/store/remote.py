"""A Zarr store behind an fsspec URL (``s3://``, ``gs://``, ``memory://``...).

A successful PUT is an object's durability point and replaces it whole, so there is nothing to sync. What a folder's
rename does on a disk, the root's ``zarr.json`` does here: it is held back while a store is being built and put last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from inspect import signature
from typing import Self

from upath import UPath
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.core.buffer.core import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore

from ooc_influence.errors import StoreDamagedError
from ooc_influence.store.local import METADATA, checked, is_chunk, missing_chunk, short_chunk


class RemoteArrayStore(FsspecStore):
    """A folder of Zarr arrays on an object store; see :class:`LocalArrayStore`.

    Parameters
    ----------
    root : UPath
        The folder.
    read_only : bool
        Refuse writes.
    chunk_bytes : mapping of str to int or None, optional
        Given where chunks have to be there: the sizes of those that are known.
    may_lack : collection of str
        Arrays whose chunks may be missing nevertheless.
    hold_root : bool
        Keep the root's metadata here instead of writing it, until :meth:`take_root`.
    """

    def __init__(
        self,
        root: UPath,
        *,
        read_only: bool = False,
        chunk_bytes: Mapping[str, int | None] | None = None,
        may_lack: Collection[str] = (),
        hold_root: bool = False,
    ) -> None:
        made = FsspecStore.from_url(str(root), storage_options=dict(root.storage_options), read_only=read_only)
        super().__init__(made.fs, read_only=read_only, path=made.path)
        self.root = root
        self.chunk_bytes = None if chunk_bytes is None else dict(chunk_bytes)
        self.may_lack = frozenset(may_lack)
        self._hold_root = hold_root
        self._held: Buffer | None = None

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return the same store, writable or not."""
        return type(self)(
            self.root,
            read_only=read_only,
            chunk_bytes=self.chunk_bytes,
            may_lack=self.may_lack,
            hold_root=self._hold_root,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and str(self.root) == str(other.root)

    __hash__ = None  # type: ignore[assignment]

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes under ``key``; None where there is no object, unless it has to be there."""
        if self._hold_root and key == METADATA:
            return self._held
        found = await self._read(key, prototype or default_buffer_prototype(), byte_range)
        array = key.rpartition("/")[0]
        if self.chunk_bytes is not None and array not in self.may_lack and is_chunk(key):
            expected = self.chunk_bytes.get(array)
            if found is None:
                raise StoreDamagedError(missing_chunk(self.root / key))
            if byte_range is None and expected is not None and len(found) != expected:
                raise StoreDamagedError(short_chunk(self.root / key, expected, len(found)))
        return checked(found, self.root, key)

    async def _read(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        """Read an object, a whole one in one request: s3fs asks for its size first, for what large ones gain."""
        if byte_range is not None or "max_concurrency" not in signature(type(self.fs)._cat_file).parameters:
            return await super().get(key, prototype, byte_range)
        try:
            return prototype.buffer.from_bytes(await self.fs._cat_file(f"{self.path}/{key}", max_concurrency=1))
        except self.allowed_exceptions:
            return None

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write ``value`` under ``key``, replacing what is there."""
        if self._hold_root and key == METADATA:
            self._held = value
        else:
            await super().set(key, value)

    def put_all(self, documents: Mapping[str, bytes]) -> None:
        """Write many small values at once."""

        async def put() -> None:
            await asyncio.gather(*(self.set(key, cpu.Buffer.from_bytes(data)) for key, data in documents.items()))

        sync(put())

    def take_root(self) -> bytes:
        """Return the root's metadata as last set."""
        assert self._held is not None
        return bytes(self._held.to_bytes())

    def sync_folders(self) -> None:
        """Do nothing: a successful PUT is durable."""
