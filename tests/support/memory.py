"""Measures the peak memory of a child process."""

# Source code for child processes. peak_memory() returns MiB. ru_maxrss would include the peak of the parent process.
PEAK_MEMORY = """
def peak_memory():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
"""
