"""The runtime keeps freed memory for the next allocation."""

import platform

import pytest

from tests.support.trainer import run


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="concerns glibc's allocator")
def test_freed_memory_is_reused_without_page_faults() -> None:
    finished = run("tests.support.workers.page_faults")
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 5 * 16384  # ten blocks have 163,840 pages; fewer than five may fail to be reused
