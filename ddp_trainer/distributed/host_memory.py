"""Changes how this process requests memory from the operating system."""

import ctypes

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation instead of returning it to the system.

    By default, glibc returns each large block, such as the activations of a layer, and requests it again in the next
    step. Linux then fills it with zeros, page by page, which takes a quarter of the time of a training step.

    Does nothing if the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)
