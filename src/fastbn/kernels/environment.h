/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The floating-point environment: nearest rounding, subnormals kept, whatever
 * the caller or an older thread of the pool has set. It also keeps the flags
 * that our arithmetic raises from the caller. Nothing else. */
#ifndef FASTBN_ENVIRONMENT_H
#define FASTBN_ENVIRONMENT_H

#if defined(__SSE2__)
#include <immintrin.h>
typedef unsigned int fp_state;
static inline fp_state fp_enter(void)
{ fp_state saved = _mm_getcsr(); _mm_setcsr(0x1f80); return saved; }
static inline void fp_leave(fp_state saved) { _mm_setcsr(saved); }
#elif defined(__aarch64__)
#include <stdint.h>
typedef uint64_t fp_state;
static inline fp_state fp_enter(void)
{
    fp_state saved, standard = 0;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"(standard));
    return saved;
}
static inline void fp_leave(fp_state saved) { __asm__ volatile("msr fpcr, %0" : : "r"(saved)); }
#else
#include <fenv.h>
typedef fenv_t fp_state;
static inline fp_state fp_enter(void)
{ fp_state saved; fegetenv(&saved); fesetenv(FE_DFL_ENV); return saved; }
static inline void fp_leave(fp_state saved) { fesetenv(&saved); }
#endif

#endif
