"""What a process uses: CPU seconds and memory that no file backs."""

import resource

import psutil


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """User and system seconds of this process, or (RUSAGE_CHILDREN) of its children that have ended."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def children_seconds() -> float:
    """User and system seconds of this process's living descendants so far."""
    times = [member.cpu_times() for member in psutil.Process().children(recursive=True)]
    return float(sum(used.user + used.system for used in times))


def anonymous_bytes(process: psutil.Process | None = None) -> int:
    """RssAnon of a process (default: this one) and its descendants: no file and no shared memory backs it."""
    process = process or psutil.Process()
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            with open(f"/proc/{member.pid}/status") as file:
                total += sum(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))
        except OSError:  # it has ended
            continue
    return total
