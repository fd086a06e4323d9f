/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The kernels that are linked into the library without Python, of the highest level that
 * the CPU has. CMakeLists.txt says with FASTBN_HAS_... which levels there are. */
#ifndef FASTBN_LEVELS_H
#define FASTBN_LEVELS_H

#include <stddef.h>

/* In the order of fastbn_dtype; then those of images. */
#define KERNELS_OF(level) \
    extern const void *fastbn_##level##_float32(void); \
    extern const void *fastbn_##level##_float64(void); \
    extern const void *fastbn_##level##_float16(void); \
    extern const void *fastbn_##level##_bfloat16(void); \
    extern const void *fastbn_##level##_images(void); \
    static const void *level##_kernels(int kind) \
    { \
        switch (kind) { \
        case 0: return fastbn_##level##_float32(); \
        case 1: return fastbn_##level##_float64(); \
        case 2: return fastbn_##level##_float16(); \
        case 3: return fastbn_##level##_bfloat16(); \
        default: return fastbn_##level##_images(); \
        } \
    }

#ifdef FASTBN_HAS_V4
KERNELS_OF(v4)
#endif
#ifdef FASTBN_HAS_V3
KERNELS_OF(v3)
#endif
#ifdef FASTBN_HAS_V2
KERNELS_OF(v2)
#endif
#ifdef FASTBN_HAS_BASELINE
KERNELS_OF(baseline)
#endif

/* NULL: the CPU has none of the levels. */
static inline const void *linked_kernels(int kind)
{
#ifdef FASTBN_HAS_V4
    if (__builtin_cpu_supports("x86-64-v4")) return v4_kernels(kind);
#endif
#ifdef FASTBN_HAS_V3
    if (__builtin_cpu_supports("x86-64-v3")) return v3_kernels(kind);
#endif
#ifdef FASTBN_HAS_V2
    if (__builtin_cpu_supports("x86-64-v2")) return v2_kernels(kind);
#endif
#ifdef FASTBN_HAS_BASELINE
    return baseline_kernels(kind);
#else
    (void)kind;
    return NULL;
#endif
}

#endif
