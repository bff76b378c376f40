"""What the kernel says of the gate's processes: memory, time, descriptors. It touches none of them."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from proxy.metrics.meter import Number, Snapshot, Totals
from proxy.metrics.table import METRICS, Part

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CPU = "process_cpu_seconds_total"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process uses. `started` (ticks since boot) tells it from a later one that got its number."""

    started: int
    cpu_ticks: int
    memory_bytes: int
    open_fds: int
    max_fds: int


class Processes:
    """The process metrics of a gate. Time that was used stays, also when the process is gone."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._seen: set[tuple[int, int]] = set()

    def look(self, workers: Iterable[int], others: Mapping[Part, int | None] | None = None) -> Snapshot:
        """Of this process, of the workers and the inspectors that they started, and of others where there are any."""
        seen = set()
        for part, pid in _parts(workers, others or {}):
            usage = read_usage(pid)
            if usage is not None:
                process = (pid, usage.started)
                seen.add(process)
                self._totals.see(process, _series(part, usage))
        for process in self._seen - seen:
            self._totals.retire(process)
        self._seen = seen
        sums = self._totals.sum()
        for series, value in sums.items():
            if series.startswith(_CPU) and not isinstance(value, list):
                sums[series] = value / _TICKS_PER_S  # only here: sums of floats depend on their order, and may go back
        return sums


def read_usage(pid: int) -> Usage | None:
    """None: it is gone."""
    proc = Path("/proc", str(pid))
    try:
        # proc_pid_stat(5): the name stands in parentheses and may hold any others
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        return Usage(
            started=int(fields[19]),
            cpu_ticks=int(fields[11]) + int(fields[12]),
            memory_bytes=int(fields[21]) * _PAGE,
            open_fds=(proc / "fd").stat().st_size or len(os.listdir(proc / "fd")),  # its size counts since Linux 6.2
            max_fds=resource.prlimit(pid, resource.RLIMIT_NOFILE)[0],
        )
    except (FileNotFoundError, ProcessLookupError):
        return None


def _parts(workers: Iterable[int], others: Mapping[Part, int | None]) -> Iterator[tuple[Part, int]]:
    yield Part.SUPERVISOR, os.getpid()
    yield from ((part, pid) for part, pid in others.items() if pid is not None)
    for worker in workers:
        yield Part.WORKER, worker
        yield from ((Part.INSPECTOR, child) for child in _children(worker))


def _children(pid: int) -> list[int]:
    """Those that its first thread started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _series(part: Part, usage: Usage) -> Snapshot:
    numbers: dict[str, Number] = {
        "process_resident_memory_bytes": usage.memory_bytes,
        _CPU: usage.cpu_ticks,
        "process_open_fds": usage.open_fds,
        "process_max_fds": usage.max_fds,
    }
    return {METRICS[name].series(part): number for name, number in numbers.items()}
