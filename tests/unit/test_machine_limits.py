"""Errors of the machine, such as a lack of memory, are reported in one line. Bugs are not mistaken for them."""

import errno
import resource

import pytest

from data_prep.machine_limits import lacks_memory, machine_problem


@pytest.mark.parametrize(
    ("limit", "words"), [(resource.RLIM_INFINITY, "not enough free memory"), (2**30, "1,074 MB, is too low")]
)
def test_error_for_a_lack_of_memory_names_the_limit_if_there_is_one(
    limit: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    for error in (MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("std::bad_alloc")):
        assert words in (machine_problem(error) or "")


@pytest.mark.parametrize(("limit", "is_lack_of_memory"), [(resource.RLIM_INFINITY, False), (2**30, True)])
def test_failure_to_map_a_library_counts_as_a_lack_of_memory_only_under_a_memory_limit(
    limit: int, is_lack_of_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    error = ImportError("libtiff.so: failed to map segment from shared object")
    assert lacks_memory(error) == is_lack_of_memory
    problem = "the memory limit of this shell" if is_lack_of_memory else "a library cannot be loaded: libtiff.so"
    assert (machine_problem(error) or "").startswith(problem)


def test_other_errors_of_the_system_are_quoted_and_bugs_are_not_hidden() -> None:
    disk_full = OSError(errno.ENOSPC, "No space left on device", "new\nset")
    assert machine_problem(disk_full) == r"[Errno 28] No space left on device: 'new\nset'"
    assert machine_problem(ValueError("a bug")) is None
