/* SPDX-License-Identifier: BSD-3-Clause
 * What the system and OpenMP say of threads; without OpenMP, one thread. It notices
 * forks, and changes nothing. */
#ifndef FASTBN_THREADS_H
#define FASTBN_THREADS_H

#ifdef _WIN32
static inline void notice_forks(int forked_before) { (void)forked_before; }
static inline int forked(void) { return 0; }
#else
#include <pthread.h>
/* Is this process the child of a fork? OpenMP's threads do not live on in it, and
 * libgomp would wait for them for ever. A fork by C code is noticed, too. */
static int is_forked_child = 0;
static void note_fork(void) { is_forked_child = 1; }
static inline void notice_forks(int forked_before)
{ is_forked_child = forked_before; pthread_atfork(NULL, NULL, note_fork); }
static inline int forked(void) { return is_forked_child; }
#endif

#if defined(_OPENMP) && (defined(__linux__) || defined(__APPLE__))
#include <dlfcn.h>
#include <omp.h>
/* The file of the runtime that this process really has. */
static inline const char *openmp_runtime(void)
{
    Dl_info info;
    return dladdr((void *)omp_get_max_threads, &info) && info.dli_fname ? info.dli_fname : "";
}
#else
static inline const char *openmp_runtime(void) { return ""; }
#endif

#ifdef _OPENMP
#include <omp.h>
static inline int openmp_version(void) { return _OPENMP; }
static inline int openmp_max_threads(void) { return omp_get_max_threads(); }
static inline int openmp_processors(void) { return omp_get_num_procs(); }
static inline double openmp_clock(void) { return omp_get_wtime(); }
#else
static inline int openmp_version(void) { return 0; }
static inline int openmp_max_threads(void) { return 1; }
static inline int openmp_processors(void) { return 1; }
static inline double openmp_clock(void) { return 0; }
#endif

#endif
