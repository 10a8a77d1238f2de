"""Bringing a store of an older format to the present one, in place: metadata change, and the last write decides.

Format 1 to 2: every group gets its file of commit records, the groups with dropped rows are listed, the attributes get
a digest. Format 2 to 3: the number only; int8 and int4 rows stay without blocks, and those appended later have none
either. A run that is interrupted leaves a readable store of the old format and is simply repeated.
"""

from __future__ import annotations

import numpy as np

from ooc_influence.store import commits, local, paths
from ooc_influence.store.arrays import open_group, writable_array
from ooc_influence.store.claim import make_claim
from ooc_influence.store.creation import write_attributes
from ooc_influence.store.gradient_store import GradientStore
from ooc_influence.store.layout import FORMAT_VERSION, MARKS
from ooc_influence.store.paths import PathLike, array_store, is_local
from ooc_influence.store.tombstones import list_groups


def upgrade_store(path: PathLike) -> bool:
    """Upgrade a store to the present format; return whether there was anything to do.

    Raises
    ------
    StoreBusyError
        If another process writes to it.
    StoreDamagedError
        If its commit records have a gap.
    """
    store = GradientStore.open(path)
    if store.attrs["format"] == FORMAT_VERSION:
        return False
    claim = make_claim(store.path, 0, store.layout.planned_rows)
    try:
        store.reload()
        if store.attrs["format"] == 1:
            _upgrade_first(store)
        write_attributes(store.path, {**store.attrs, "format": FORMAT_VERSION, "layout": store.layout.to_dict()})
    finally:
        claim.release()
    return True


def _upgrade_first(store: GradientStore) -> None:
    files = array_store(store.path)
    group = open_group(files, "r+")
    records: commits.Records = np.asarray(store.records)
    writable_array(group, "commits")[...] = records
    group.require_group(MARKS)
    list_groups(files, store.dropped_groups())
    if is_local(store.path):  # locks of the old format
        for name in paths.names(store.path / "commits"):
            if name.startswith(".claim-") and not name.rpartition(".")[2].isdigit():
                paths.remove_file(store.path / "commits" / name)
        local.sync_tree(store.path)
    files.sync_folders()
