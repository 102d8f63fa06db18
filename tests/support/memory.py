"""Peak memory of a process, asked from within it."""

# Source code for a child process: peak_memory() in MiB. Not ru_maxrss, which begins with the peak of the parent.
PEAK_MEMORY = """
def peak_memory():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
"""
