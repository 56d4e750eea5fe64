"""The processor cores this process may use: CPU affinity, cgroup quotas, and what other programs leave of them.

Only the standard library is imported here (psutil where there is no /proc), so `llmctl doctor` can ask before
torch is loaded.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
FIELDS = 8  # of a line of /proc/stat: user nice system idle iowait irq softirq steal; guest time is in user already
IDLE = (3, 4)  # of these: idle and iowait
CPU_LINE = re.compile(r"cpu(\d+)(?: \d+){5,}\s*$", re.ASCII)


@dataclass(frozen=True)
class Cores:
    """What bounds the number of threads.

    Attributes:
        allowed: logical processors this process may run on (CPU affinity, cpuset).
        online: logical processors of the machine.
        physical: physical cores among the allowed processors: hyperthreads of one core count once.
        quota: cores' worth of CPU time that the cgroups allow; None without a limit.
    """

    allowed: frozenset[int]
    online: int
    physical: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Physical cores that can be kept busy at the same time, at least 1; a quota is rounded down."""
        return max(1, self.physical if self.quota is None else min(self.physical, int(self.quota)))


def read_cores(root: Path = ROOT) -> Cores:
    """The cores of this process.

    Args:
        root: where /proc and /sys are looked for.
    """
    online = os.cpu_count() or 1
    allowed = frozenset(os.sched_getaffinity(0)) if sys.platform == "linux" else frozenset(range(online))
    return Cores(allowed, online, physical_cores(allowed, root), cpu_quota(root))


def physical_cores(allowed: frozenset[int], root: Path = ROOT) -> int:
    """Physical cores among logical processors, by /sys; where that says nothing, by psutil."""
    siblings = set()
    for cpu in allowed:
        try:
            path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            siblings.add(path.read_text(encoding="ascii").strip())
        except (OSError, UnicodeDecodeError):
            return max(1, min(len(allowed), _physical_by_psutil() or len(allowed)))
    return max(1, len(siblings))


def _physical_by_psutil() -> int | None:
    import psutil

    return psutil.cpu_count(logical=False)


# --- cgroups ----------------------------------------------------------------------------------------


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of CPU time that the cgroups of this process allow: the least of all groups up the tree.

    Reads `cpu.max` (cgroup v2) and `cpu.cfs_quota_us` over `cpu.cfs_period_us` (v1). A file that is missing,
    unreadable or malformed sets no limit. None where nothing does.
    """
    limits = [limit for folder in _group_folders(root) if (limit := _limit_of(folder)) is not None]
    return min(limits, default=None)


def _limit_of(folder: Path) -> float | None:
    """The quota of one group; None for none."""
    words = _read(folder / "cpu.max").split()
    if not words:
        words = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # `max`, an empty file, or anything that is not two numbers
        return None
    return quota / period if quota > 0 and period > 0 else None


def _group_folders(root: Path) -> Iterator[Path]:
    """The folder of each cgroup that may limit CPU time: this process's own, and those above it."""
    paths = _group_paths(root)
    for mounted_root, mount_point, version in _cgroup_mounts(root):
        if version not in paths:
            continue
        inside = PurePosixPath(paths[version])
        # in a container the mount may show the process's group, or one above it, as its top
        inside = inside.relative_to(mounted_root) if inside.is_relative_to(mounted_root) else PurePosixPath()
        top = root / mount_point.lstrip("/")
        for part in (inside, *inside.parents):
            yield top / part.as_posix().lstrip("/")


def _group_paths(root: Path) -> dict[int, str]:
    """cgroup version -> the path of this process's group in the hierarchy that has the cpu controller."""
    paths = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # a path that leads out of the namespace is of no use
        if not path.startswith("/") or ".." in path.split("/"):
            path = "/"
        if number == "0" and not controllers:
            paths[2] = path
        elif "cpu" in controllers.split(","):
            paths[1] = path
    return paths


def _cgroup_mounts(root: Path) -> Iterator[tuple[str, str, int]]:
    """(path of the group that is mounted, mount point, cgroup version) of the mounts that may limit CPU time."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or not kinds:
            continue
        mounted_root, mount_point = fields[3].replace("\\040", " "), fields[4].replace("\\040", " ")
        if kinds[0] == "cgroup2":
            yield mounted_root, mount_point, 2
        elif kinds[0] == "cgroup" and "cpu" in kinds[-1].split(","):
            yield mounted_root, mount_point, 1


def _read(path: Path) -> str:
    """The text of a file of the kernel; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# --- how busy they are ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """CPU time used so far.

    Attributes:
        machine: logical processor -> (busy, all) in any unit.
        own: seconds used by this process, all threads.
        clock: seconds.
    """

    machine: Mapping[int, tuple[float, float]]
    own: float
    clock: float


def read_usage(root: Path = ROOT) -> Usage:
    """The counters as they stand."""
    machine = {}
    for line in _read(root / "proc/stat").splitlines():
        if found := CPU_LINE.match(line):
            times = [int(word) for word in line.split()[1 : 1 + FIELDS]]
            machine[int(found[1])] = (sum(times) - sum(times[i] for i in IDLE), sum(times))
    if not machine and root == ROOT:
        machine = _usage_by_psutil()
    return Usage(machine, time.process_time(), time.monotonic())


def _usage_by_psutil() -> dict[int, tuple[float, float]]:
    import psutil

    counters = enumerate(psutil.cpu_times(percpu=True))
    return {number: (sum(times) - times.idle, sum(times)) for number, times in counters}


def used_by_others(before: Usage, after: Usage, allowed: frozenset[int]) -> float:
    """Cores' worth of the allowed processors that other programs used between two readings."""
    busy = 0.0
    for cpu in allowed & before.machine.keys() & after.machine.keys():
        worked, passed = (
            now - then for now, then in zip(after.machine[cpu], before.machine[cpu], strict=True)
        )
        if passed > 0:
            busy += min(1.0, max(0.0, worked / passed))
    elapsed = after.clock - before.clock
    own = (after.own - before.own) / elapsed if elapsed > 0 else 0.0
    return max(0.0, busy - own)
