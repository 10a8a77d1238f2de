"""Limits of control groups, read from small trees as the kernel lays them out."""

from __future__ import annotations

import os

import pytest

from ooc_influence import memory, parallel

GIB = 2**30
NONE_V1 = 9223372036854771712
CGROUP2 = "30 23 0:26 {top} {seen} rw,nosuid shared:4 - cgroup2 cgroup2 rw"
CGROUP1 = "{number} 31 0:{number} {top} {seen} rw,relatime - cgroup cgroup rw,{controllers}"
V1 = [
    CGROUP1.format(number=32, top="/", seen="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"),
    CGROUP1.format(number=35, top="/", seen="/sys/fs/cgroup/memory", controllers="memory"),
]
V2 = CGROUP2.format(top="/", seen="/sys/fs/cgroup")


def tree(root, own, mounts, groups):
    """A file system's root: this process's groups, what is mounted where, and files by folder."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("\n".join(own) + "\n")
    (root / "proc/self/mountinfo").write_text("\n".join(["22 1 8:1 / / rw - ext4 /dev/root rw", *mounts]) + "\n")
    for folder, files in groups.items():
        path = root / folder.lstrip("/")
        path.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (path / name).write_text(f"{value}\n")
    return root


def v2(limit, used, *, high="max", inactive=0, **more):
    stat = f"anon 5\nfile 7\ninactive_file {inactive}\nactive_file 3"
    return {"memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat} | more


def v1(limit, used, *, inactive=0, above=NONE_V1):
    stat = f"cache 9\ninactive_file 1\nhierarchical_memory_limit {above}\ntotal_inactive_file {inactive}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


SLICE = "/sys/fs/cgroup/system.slice"
JOB = "/sys/fs/cgroup/memory/slurm/uid_7/job_42"
DOCKER = "/docker/1234abcd"
MEMORY = {
    # the root of version 2 has none of these files
    "nothing": ([], [], {}, None),
    "no limit": (["0::/a"], [V2], {"/sys/fs/cgroup/a": v2("max", GIB)}, None),
    "version 2, its own": (
        ["0::/system.slice/my.service"], [V2],
        {f"{SLICE}/my.service": v2(4 * GIB, 3 * GIB, inactive=GIB), SLICE: v2("max", 9 * GIB)}, 2 * GIB,
    ),
    "version 2, a group above": (
        ["0::/system.slice/my.service"], [V2],
        {f"{SLICE}/my.service": v2("max", 3 * GIB), SLICE: v2(10 * GIB, 9 * GIB)}, GIB,
    ),
    "version 2, throttled": (["0::/a"], [V2], {"/sys/fs/cgroup/a": v2(8 * GIB, GIB, high=3 * GIB)}, 2 * GIB),
    "a full group": (["0::/a"], [V2], {"/sys/fs/cgroup/a": v2(GIB, GIB + 4096)}, 0),
    "a container's own view, version 2": (["0::/"], [V2], {"/sys/fs/cgroup": v2(2 * GIB, GIB)}, GIB),
    "a container that sees the host's names, version 2": (
        [f"0::{DOCKER}"], [CGROUP2.format(top=DOCKER, seen="/sys/fs/cgroup")],
        {"/sys/fs/cgroup": v2(2 * GIB, GIB)}, GIB,
    ),
    "a group outside of what is seen": (["0::/../other"], [V2], {"/sys/fs/cgroup": v2(2 * GIB, GIB)}, GIB),
    "version 1, a job of SLURM": (
        ["4:memory:/slurm/uid_7/job_42/step_0", "1:cpu,cpuacct:/"], V1,
        {JOB: v1(16 * GIB, 10 * GIB, inactive=2 * GIB), f"{JOB}/step_0": v1(NONE_V1, GIB),
         "/sys/fs/cgroup/memory": v1(NONE_V1, 90 * GIB)}, 8 * GIB,
    ),
    "version 1, a container": (
        [f"4:memory:{DOCKER}"], [V1[1].replace(" / ", f" {DOCKER} ", 1)],
        {"/sys/fs/cgroup/memory": v1(3 * GIB, GIB)}, 2 * GIB,
    ),
    "version 1, a limit out of sight": (
        ["4:memory:/"], V1, {"/sys/fs/cgroup/memory": v1(NONE_V1, GIB, above=5 * GIB)}, 4 * GIB,
    ),
    "both versions, memory in the first": (
        ["4:memory:/job", "0::/user.slice"], [*V1, CGROUP2.format(top="/", seen="/sys/fs/cgroup/unified")],
        {"/sys/fs/cgroup/memory/job": v1(2 * GIB, GIB), "/sys/fs/cgroup/unified/user.slice": {"cgroup.procs": "1"}},
        GIB,
    ),
    "a place with a space": (
        ["0::/a"], [CGROUP2.format(top="/", seen=r"/my\040groups")], {"/my groups/a": v2(2 * GIB, GIB)}, GIB,
    ),
    "names with colons": (["0::/a:b"], [V2], {"/sys/fs/cgroup/a:b": v2(2 * GIB, GIB)}, GIB),
}  # fmt: skip


def test_memory_left(tmp_path):
    for case in MEMORY:
        own, mounts, groups, expected = MEMORY[case]
        assert memory.memory_left(tree(tmp_path / case, own, mounts, groups)) == expected


def test_a_process_without_proc_has_no_limits(tmp_path):
    assert (memory.memory_left(tmp_path), memory.cpu_share(tmp_path)) == (None, None)


CPU = {
    "no limit": (["0::/a"], [V2], {"/sys/fs/cgroup/a": {"cpu.max": "max 100000"}}, None),
    "version 2": (["0::/a"], [V2], {"/sys/fs/cgroup/a": {"cpu.max": "250000 100000"}}, 2.5),
    "version 2, a group above": (
        ["0::/a/b"], [V2],
        {"/sys/fs/cgroup/a": {"cpu.max": "150000 100000"}, "/sys/fs/cgroup/a/b": {"cpu.max": "max 100000"}}, 1.5,
    ),
    "version 1": (
        ["4:cpu,cpuacct:/job"], V1,
        {"/sys/fs/cgroup/cpu,cpuacct/job": {"cpu.cfs_quota_us": 400000, "cpu.cfs_period_us": 100000},
         "/sys/fs/cgroup/cpu,cpuacct": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}}, 4.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CPU)
def test_cpu_share(tmp_path, case):
    own, mounts, groups, expected = CPU[case]
    assert memory.cpu_share(tree(tmp_path, own, mounts, groups)) == expected


def test_the_budget_and_the_cores_are_those_of_the_group(monkeypatch):
    monkeypatch.setattr(memory, "memory_left", lambda: 12345)
    assert memory.available() == 12345
    monkeypatch.setattr(memory, "memory_left", lambda: None)
    assert memory.available() > 12345
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for share, expected in ((None, 8), (2.5, 2), (0.3, 1), (64.0, 8)):
        monkeypatch.setattr(parallel, "cpu_share", lambda share=share: share)
        assert parallel.cores() == expected
