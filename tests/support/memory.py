"""Source code with which a child process measures its own peak memory."""

# peak_memory() returns MiB. It does not use ru_maxrss, which would include the peak of the parent process.
PEAK_MEMORY = """
def peak_memory():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
"""
