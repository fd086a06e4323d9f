/* SPDX-License-Identifier: BSD-3-Clause
 * Threads, and what those of a team tell each other: atomic numbers; the time; ways to
 * wait. No loops, no decisions. */
#ifndef FASTBN_THREADS_TEAM_H
#define FASTBN_THREADS_TEAM_H

#include <stdint.h>
#include <time.h>

#define BETWEEN_QUESTIONS 0.05      /* seconds, after which the caller is asked again */

#ifdef _OPENMP
#include <omp.h>
static inline void in_parallel(int threads, void (*member)(void *team, int me), void *team)
{
#pragma omp parallel num_threads(threads)
    member(team, omp_get_thread_num());
}
static inline int team_size(void) { return omp_get_num_threads(); }
static inline double team_clock(void) { return omp_get_wtime(); }
#else
static inline void in_parallel(int threads, void (*member)(void *team, int me), void *team)
{ (void)threads; member(team, 0); }
static inline int team_size(void) { return 1; }
static inline double team_clock(void)
{ struct timespec t; timespec_get(&t, TIME_UTC); return t.tv_sec + 1e-9 * t.tv_nsec; }
#endif

/* Order does not matter: what the numbers guard is read after OpenMP's own barriers. */
static inline uint64_t atomic_read(const uint64_t *p)
{ return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void atomic_increase(uint64_t *p)
{ __atomic_fetch_add(p, 1, __ATOMIC_RELAXED); }
static inline int atomic_replace(uint64_t *p, uint64_t *expected, uint64_t wanted)
{ return __atomic_compare_exchange_n(p, expected, wanted, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED); }

/* Ways to wait, each slower and kinder than the one before. To give way may change
 * nothing for milliseconds; to sleep, however shortly, frees the processor at once,
 * and costs some 50 us. */
#if defined(__SSE2__)
#include <immintrin.h>
static inline void relax(void) { _mm_pause(); }
#elif defined(__aarch64__)
static inline void relax(void) { __asm__ volatile("yield"); }
#else
static inline void relax(void) {}
#endif

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
static inline void give_way(void) { SwitchToThread(); }
static inline void nap(void) { Sleep(1); }
#else
#include <sched.h>
static inline void give_way(void) { sched_yield(); }
static inline void nap(void)
{ const struct timespec shortly = {0, 1000}; nanosleep(&shortly, NULL); }
#endif

#endif
