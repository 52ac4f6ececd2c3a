"""Facts about this computer that need no torch: CPU cores and free memory."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory_mib() -> float:
    """Free memory of this machine or, if less, of its container; all memory if /proc/meminfo is missing."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    free = int(re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text())[1]) / 2**10
    for group, limit, used, cached in control_groups():
        with contextlib.suppress(OSError, ValueError, TypeError):       # no such control group, or no limit
            reclaimable = re.search(rf"^{cached} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            left = int((group / limit).read_text()) - int((group / used).read_text()) + int(reclaimable[1])
            free = min(free, left / 2**20)
    return free


def control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """Each cgroup (v1, v2) that may limit our memory: folder, limit file, usage file, key in memory.stat."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            own = Path(name.lstrip("/"))
            for group in (own, *own.parents):
                if not controllers:
                    yield Path("/sys/fs/cgroup") / group, "memory.max", "memory.current", "inactive_file"
                elif controllers == "memory":
                    yield (Path("/sys/fs/cgroup/memory") / group, "memory.limit_in_bytes",
                           "memory.usage_in_bytes", "total_inactive_file")
