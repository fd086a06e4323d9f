/* SPDX-License-Identifier: BSD-3-Clause
 * The yardstick: a copy on several threads, with ordinary or with streaming stores.
 * Compiled when the benchmark runs; no part of the package. */
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <immintrin.h>
#ifdef __AVX__
typedef __m256i word;
#define LOAD(p) _mm256_loadu_si256((const word *)(p))
#define STREAM(p, v) _mm256_stream_si256((word *)(p), v)
#else
typedef __m128i word;
#define LOAD(p) _mm_loadu_si128((const word *)(p))
#define STREAM(p, v) _mm_stream_si128((word *)(p), v)
#endif

static void copy_past_the_cache(const char *from, char *to, size_t n)
{
    size_t i = (64 - (uintptr_t)to % 64) % 64;
    if (n < 128) {
        memcpy(to, from, n);
        return;
    }
    memcpy(to, from, i);
    for (; i + 64 <= n; i += 64)
        for (size_t k = 0; k < 64; k += sizeof(word))
            STREAM(to + i + k, LOAD(from + i + k));
    memcpy(to + i, from + i, n - i);
    _mm_sfence();
}
#else
#define copy_past_the_cache memcpy
#endif

void copy(const char *from, char *to, size_t n, int streaming, int threads, int count)
{
    size_t share = (n / threads + 64) / 64 * 64;
    for (int k = 0; k < count; k++) {
        #pragma omp parallel num_threads(threads) if (threads > 1)
        {
            size_t start = share * omp_get_thread_num();
            size_t size = start >= n ? 0 : start + share > n ? n - start : share;
            if (streaming)
                copy_past_the_cache(from + start, to + start, size);
            else
                memcpy(to + start, from + start, size);
        }
    }
}
