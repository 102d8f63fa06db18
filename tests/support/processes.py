"""Finds processes by what stands in /proc."""

from pathlib import Path


def read(pid: int, name: str) -> bytes:
    """A file of /proc/PID; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def processes_with(*words: str) -> list[int]:
    """Living processes, zombies left out, with each of `words` in their environment or command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            text = read(int(entry.name), "environ") + read(int(entry.name), "cmdline")
            if text and all(word.encode() in text for word in words):
                found.append(int(entry.name))
    return found
