"""What a process makes of the machine it runs on."""

import platform

import pytest

from tests.support.trainer import run


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="concerns glibc's allocator")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    finished = run("tests.support.workers.page_faults")
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 5 * 16384  # pages, of ten blocks; something small may settle in a freed one
