// What this build of FFCV leaves out, and how it says so.
#pragma once
#include <stdio.h>
#include <unistd.h>

// Ends the process. FFCV ignores what these calls return, so training would continue with images that were never filled.
[[noreturn]] static inline void left_out(const char *what) {
    fprintf(stderr, "error: this build of FFCV cannot %s: it reads and writes raw images only\n", what);
    _exit(1);
}
