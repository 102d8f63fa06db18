// Defines `left_out`, which is called instead of functions that this build of FFCV does not have.
#pragma once
#include <stdio.h>
#include <unistd.h>

// Prints an error and ends the process. FFCV ignores the return values of the replaced functions, so without
// this error, training would continue with uninitialized images.
[[noreturn]] static inline void left_out(const char *what) {
    fprintf(stderr, "error: this build of FFCV cannot %s: it reads and writes raw images only\n", what);
    _exit(1);
}
