"""Two names exchanged in one step, where the system can do that."""

import ctypes
import os
import sys
from pathlib import Path

_AT_FDCWD = -100  # of Linux: paths are relative to the working folder
_RENAME_EXCHANGE = _RENAME_SWAP = 2


def exchange(first: Path, second: Path) -> bool:
    """Let two files or folders of one file system have each other's names, so that nobody ever finds either missing.

    Returns:
        Whether that was done; False, and nothing has changed, where system or file system cannot do it.
    """
    names = (os.fsencode(first), os.fsencode(second))
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, ctypes.c_uint(_RENAME_SWAP))
        else:
            failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    except (AttributeError, TypeError):  # no such function, or (on Windows) no such library
        return False
    return not failed
