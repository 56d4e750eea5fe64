"""Affinity, cgroup quotas and busy cores, read from files that are laid out as the kernel does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.kernels.cores import Cores, Usage, cpu_quota, physical_cores, read_usage, used_by_others
from llmctl.kernels.threads import choose_threads

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
# a container whose mount shows its own group as the top
DOCKER = "32 31 0:29 /docker/ab /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n"

# what it shows -> /proc/self/cgroup, /proc/self/mountinfo, files below /sys/fs/cgroup, the quota
QUOTAS: dict[str, tuple[str, str, dict[str, str], float | None]] = {
    "v2": ("0::/\n", V2, {"cpu.max": "200000 100000\n"}, 2.0),
    "v2 without a limit": ("0::/\n", V2, {"cpu.max": "max 100000\n"}, None),
    "v2, a part of a core": ("0::/\n", V2, {"cpu.max": "50000 100000\n"}, 0.5),
    "v2, the own group": ("0::/a/b\n", V2, {"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "max 100000\n"}, 1.5),
    "v2, the group above is smaller": (
        "0::/a/b\n", V2, {"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0,
    ),
    "v2, a group beside it": ("0::/a/b\n", V2, {"a/c/cpu.max": "100000 100000\n"}, None),
    "v1": (
        "4:cpu,cpuacct:/\n", V1,
        {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2.5,
    ),
    "v1 without a limit": (
        "4:cpu,cpuacct:/\n", V1,
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, None,
    ),
    "v1, nested": (
        "4:cpu,cpuacct:/x/y\n", V1,
        {
            "cpu,cpuacct/x/y/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/x/y/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/x/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "50000\n",
        }, 1.0,
    ),
    "v1, mounted at the own group": (
        "7:cpu:/docker/ab\n", DOCKER, {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0,
    ),
    "v1 in another controller": (
        "7:memory:/\n", MEMORY,
        {"memory/cpu.cfs_quota_us": "200000\n", "memory/cpu.cfs_period_us": "100000\n"}, None,
    ),
    "both versions": (
        "4:cpu,cpuacct:/\n0::/\n", V1 + V2,
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "cpu.max": "400000 100000\n",
        }, 3.0,
    ),
    "a path out of the namespace": ("0::/../../other\n", V2, {"cpu.max": "200000 100000\n"}, 2.0),
    "no such group": ("0::/gone\n", V2, {"cpu.max": "200000 100000\n"}, 2.0),
    "garbage in the file": ("0::/\n", V2, {"cpu.max": "plenty of it\n"}, None),
    "one number": ("0::/\n", V2, {"cpu.max": "200000\n"}, None),
    "a period of zero": ("0::/\n", V2, {"cpu.max": "200000 0\n"}, None),
    "an empty file": ("0::/\n", V2, {"cpu.max": ""}, None),
    "not even text": ("0::/\n", V2, {"cpu.max": "\udcff\udcfe"}, None),
    "half of v1": ("4:cpu,cpuacct:/\n", V1, {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n"}, None),
    "garbage in the lists": ("::\nx\n\n1:2\n", " - \nx - cgroup2\n- -\n", {"cpu.max": "200000 100000\n"}, None),
    "no cgroups": ("", "", {}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", QUOTAS)
def test_quota(case: str, tmp_path: Path) -> None:
    groups, mounts, files, expected = QUOTAS[case]
    own = tmp_path / "proc/self"
    own.mkdir(parents=True)
    (own / "cgroup").write_text(groups)
    (own / "mountinfo").write_text(mounts)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(errors="surrogateescape"))
    assert cpu_quota(tmp_path) == expected


def test_no_files_set_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    unreadable = tmp_path / "proc/self/cgroup"
    unreadable.mkdir(parents=True)  # a folder cannot be read as a file
    assert cpu_quota(tmp_path) is None


def test_hyperthreads_of_a_core_count_once(tmp_path: Path) -> None:
    for cpu in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert physical_cores(frozenset(range(8)), tmp_path) == 4
    assert physical_cores(frozenset({0, 4}), tmp_path) == 1
    assert physical_cores(frozenset({0, 1, 5}), tmp_path) == 2


# --- how busy they are ------------------------------------------------------------------------------


def stat(tmp_path: Path, text: str) -> Usage:
    (tmp_path / "proc").mkdir(exist_ok=True)
    (tmp_path / "proc/stat").write_text(text)
    return read_usage(tmp_path)


def test_use_by_others(tmp_path: Path) -> None:
    before = stat(
        tmp_path, "cpu  9 9 9 9\ncpu0 100 0 50 900 0 0 0 0 7 0\ncpu1 0 0 0 1000 0 0 0 0 0 0\nintr 5\n"
    )
    after = stat(
        tmp_path, "cpu  9 9 9 9\ncpu0 106 1 51 900 0 1 0 1 7 0\ncpu1 0 0 0 1008 2 0 0 0 0 0\nintr 6\n"
    )
    # one second of clock in which this process used a quarter of a core
    before, after = Usage(before.machine, 10.0, 100.0), Usage(after.machine, 10.25, 101.0)
    assert used_by_others(before, after, frozenset({0, 1})) == pytest.approx(0.75)
    assert used_by_others(before, after, frozenset({1})) == 0.0  # waiting for a disk is not work
    assert used_by_others(before, after, frozenset({5})) == 0.0
    assert used_by_others(before, before, frozenset({0, 1})) == 0.0


def test_odd_counters_are_left_out(tmp_path: Path) -> None:
    odd = stat(tmp_path, "cpu0 1 2\ncpux 1 2 3 4 5 6 7 8\ncpu1 a b c d e f g h\ncpu2 1 1 1 1 1 1 1 1\n\n")
    assert set(odd.machine) == {2}
    assert read_usage(tmp_path / "nowhere").machine == {}


# --- the choice -------------------------------------------------------------------------------------


def cores(allowed: int, online: int = 0, physical: int = 0, quota: float | None = None) -> Cores:
    return Cores(frozenset(range(allowed)), online or allowed, physical or allowed, quota)


# cores, what others use, OMP_NUM_THREADS -> threads, most, why
CHOICES: list[tuple[Cores, float, int | None, int, int, str]] = [
    (cores(2), 0.1, None, 2, 2, "2 cores"),
    (cores(1), 0.0, None, 1, 1, "1 core"),
    (cores(2), 0.9, None, 1, 2, "2 cores, other programs keep 1 busy"),
    (cores(2), 2.0, None, 1, 2, "2 cores, other programs keep 2 busy"),
    (cores(4, online=64), 0.0, None, 4, 4, "4 cores, CPU affinity allows 4 of 64 processors"),
    (
        cores(64, quota=2.0),
        30.0,
        None,
        2,
        2,
        "64 cores, the cgroup's quota is 2, other programs keep 30 busy",
    ),
    (cores(64, quota=2.5), 0.0, None, 2, 2, "64 cores, the cgroup's quota is 2.5"),
    (cores(8, quota=0.5), 0.0, None, 1, 1, "8 cores, the cgroup's quota is 0.5"),
    (cores(16, physical=8), 0.2, None, 8, 8, "8 cores, 16 hyperthreads"),
    (cores(16, physical=8), 3.2, None, 5, 8, "8 cores, 16 hyperthreads, other programs keep 3 busy"),
    (cores(8), 0.0, 3, 3, 3, "8 cores, OMP_NUM_THREADS is 3"),
    (cores(2), 0.0, 8, 2, 2, "2 cores, OMP_NUM_THREADS is 8"),
]


@pytest.mark.parametrize(
    ("have", "used", "bound", "threads", "most", "why"), CHOICES, ids=lambda v: str(v)[:40]
)
def test_choice(have: Cores, used: float, bound: int | None, threads: int, most: int, why: str) -> None:
    choice = choose_threads(have, used, bound)
    assert (choice.threads, choice.most, choice.why) == (threads, most, why)


ALONE = """
import json, os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from llmctl.kernels.threads import look
choice = look()
print(json.dumps([choice.threads, choice.most, choice.why]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CPU affinity")
def test_affinity_of_this_process() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    threads, most, why = json.loads(done.stdout)
    assert (threads, most) == (1, 1) and why.startswith("1 core")
