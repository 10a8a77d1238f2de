"""Options of every kind of long call: progress, memory, workers, resuming; and the names of representations."""

from typing import TYPE_CHECKING, Annotated, TypedDict

from ooc_influence.options.option import Option

if TYPE_CHECKING:
    from ooc_influence.store import PathLike, Storage

DTYPES = ("float16", "bfloat16", "float32", "int8", "int8-linear", "int4", "sign")
DTYPE_NAMES = "{" + ", ".join(f'"{name}"' for name in DTYPES) + "}"


# fmt: off
class Reporting(TypedDict, total=False):
    """What every long call takes."""

    progress: Annotated[bool | None, Option(None, "bool, optional", "Show a progress line; silent by default.")]


class Derived(Reporting, total=False):
    """What writing a store from the rows of another takes."""

    storage: Annotated["Storage | None", Option(
        None, "Storage, optional", "Chunking and codec; default that of a new store, with the codec of this one.")]


class Budgeted(TypedDict, total=False):
    """What a call within a memory budget takes."""

    memory: Annotated[int | str | None, Option(
        None, "int or str, optional",
        'Memory budget of the process, such as ``"4GiB"``; default half of what is free, on a cluster half of a '
        "worker's limit.",
        "Memory budget, such as 4GiB. Default: half of what is free.", metavar="SIZE")]


class Striped(Budgeted, Reporting, total=False):
    """What a call takes whose rows are divided among workers."""

    workers: Annotated[int | None, Option(
        None, "int, optional",
        "Ranges of rows worked on at once; default one with all cores, or the slots of the ambient Dask cluster.",
        "Ranges of rows worked on at once. Default: one, with all cores.", kind=int, metavar="N")]


class Resumable(TypedDict, total=False):
    """What a call takes that can keep its finished parts."""

    resume: Annotated["PathLike | None", Option(
        None, "path, optional",
        "A folder to keep finished parts in: the same call, interrupted or killed, continues from them. It is removed "
        "at the end.",
        "Keep finished parts in this folder: the same command continues from them. Removed at the end.",
        kind="path", metavar="DIR")]
# fmt: on
