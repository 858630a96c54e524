"""Memory that is new to the process for certain, for tests of what is resident."""

import mmap


def touch(size: int) -> None:
    """Write to `size` bytes of new pages and give them back; malloc may hand out pages that are resident already."""
    with mmap.mmap(-1, size) as pages:
        for at in range(0, size, mmap.PAGESIZE):
            pages[at] = 1
