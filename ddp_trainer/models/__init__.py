"""Networks, and the file that says how to rebuild one."""
