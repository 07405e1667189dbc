"""How much memory this process may take, and what it held at most."""

import sys
from pathlib import Path


def limit_memory(most: int) -> None:
    """Allow this process so many bytes more than it has, where the system lets it say so."""
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most += pages * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def peak_memory() -> int:
    """Return the bytes that this process held at most so far; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
