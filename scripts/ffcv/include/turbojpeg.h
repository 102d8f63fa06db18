// Declares the part of TurboJPEG that libffcv.cpp uses. Decoding starts with tjInitDecompress or tjInitTransform. Here,
// these two end the process, so the other functions are never called. They only make the code compile.
#pragma once
#include "left_out.h"

typedef void *tjhandle;
typedef struct { int x, y, w, h; } tjregion;
typedef struct { int num, denom; } tjscalingfactor;
typedef struct { tjregion r; int op, options; } tjtransform;

enum { TJXOP_HFLIP, TJXOPT_CROP, TJFLAG_FASTDCT, TJFLAG_NOREALLOC, TJPF_RGB };
#define TJSCALED(dimension, factor) (dimension)

static inline tjhandle tjInitTransform() { left_out("decode JPEG"); }
static inline tjhandle tjInitDecompress() { left_out("decode JPEG"); }
static inline void tjFree(unsigned char *) {}

static inline int tjTransform(tjhandle, const unsigned char *, unsigned long, int, unsigned char **, unsigned long *,
                              tjtransform *, int) {
    return -1;
}

static inline int tjDecompress2(tjhandle, const unsigned char *, unsigned long, unsigned char *, int, int, int, int,
                                int) {
    return -1;
}
