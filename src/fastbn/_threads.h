/* SPDX-License-Identifier: BSD-3-Clause
 * What OpenMP says of threads; without OpenMP, one thread. Queries only. */
#ifndef FASTBN_THREADS_H
#define FASTBN_THREADS_H

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
#else
static inline int openmp_version(void) { return 0; }
static inline int openmp_max_threads(void) { return 1; }
static inline int openmp_processors(void) { return 1; }
#endif

#endif
