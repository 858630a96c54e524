"""Memory that is new to the process for certain, for tests of what is resident: malloc may hand out resident pages."""

import mmap


def new_pages(size: int) -> mmap.mmap:
    """Return `size` bytes of new pages, each written to; they are given back with the last reference."""
    pages = mmap.mmap(-1, size)
    for at in range(0, size, mmap.PAGESIZE):
        pages[at] = 1
    return pages


def touch(size: int) -> None:
    """Write to `size` bytes of new pages, and give them back."""
    new_pages(size).close()
