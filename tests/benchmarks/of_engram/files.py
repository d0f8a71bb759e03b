"""Take a table's file out of memory, as if other work had needed the room."""

import ctypes
import os
from pathlib import Path

from parallel.engram_rows import RowStore

_MADV_DONTNEED = 4
_LIBC = ctypes.CDLL(None, use_errno=True)


def drop_from_memory(store: RowStore, folder: Path) -> None:
    """Write what has changed, unmap all pages and give up those of the system's cache."""
    for name, array in store.arrays.items():
        [path] = folder.glob(f"{name}-*")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            page = os.sysconf("SC_PAGE_SIZE")
            assert array.ctypes.data % page == 0, "a mapping starts with a page"
            address, length = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
            if _LIBC.madvise(address, length, _MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), f"madvise of {path}")
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
