/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Runs of neighbouring elements of one type to those of another, with an affine function
 * of each channel between: y = (x - m) * a.
 *
 * In float64, unless said otherwise. `split`: integers of up to 16 bits to float32, in
 * float32, as exactly: a is the sum of two numbers, the first of so few bits that its product
 * with an integer is exact. `exact`: to float64, in pairs of float64 numbers.
 *
 * May: loops over neighbours, which the compiler turns into vectors; registers of AVX-512, where
 * it does not. May not: threads, Python, strides, but in `gather`.
 */
#ifndef FASTBN_CONVERT_H
#define FASTBN_CONVERT_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "turn.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    PIECE = 1024,       /* elements that are converted at most before the next step: TABLE of images.pxd */
    CACHE_LINE = 64,
    GATHERED = 8 * 4096 /* bytes that are gathered or scattered: PANEL_BYTES of images.pxd */
};

/* Registers do not cross lines of the cache there. */
typedef struct { char bytes[8 * PIECE]; } __attribute__((aligned(64))) PieceMemory;
typedef struct { char bytes[GATHERED]; } __attribute__((aligned(64))) PanelMemory;

/* ---- numbers of two parts, whose sum is meant: about 106 bits ---- */

typedef struct { double high, low; } Pair;

/* The first 26 bits. Unlike a product with 2**27 + 1 it cannot overflow. */
static inline double first_bits(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= ~(uint64_t)0x7ffffff;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

static inline Pair exact_sum(double a, double b)
{
    double s = a + b, t = s - a;
    return (Pair){s, (a - (s - t)) + (b - t)};
}

static inline Pair exact_product(double a, double b)
{
    double p = a * b, ah = first_bits(a), al = a - ah, bh = first_bits(b), bl = b - bh;
    return (Pair){p, ((ah * bh - p) + ah * bl + al * bh) + al * bl};
}

/* a / b, of which b is a pair. */
static inline Pair divided(double a, Pair b)
{
    double q = a / b.high;
    Pair p = exact_product(q, b.high);
    return (Pair){q, (((a - p.high) - p.low) - q * b.low) / b.high};
}

static inline int is_number(double x) { return x - x == 0; }

/* ---- coefficients of a channel ---- */

enum { MEAN, MEAN_REST, SCALE_OF, SCALE_REST, SHIFT_OF, CONVERSION_KINDS };

/* For normalize (x / max_value - mean) / std, or its inverse. In `k`, which is
 * CONVERSION_KINDS numbers, `step` apart. */
static inline void conversion_of(double mean, double std, double max_value, int inverse,
                                 double *k, ptrdiff_t step)
{
    Pair m, a;
    if (inverse) {
        a = exact_product(std, max_value);
        m = divided(-mean, (Pair){std, 0});
        k[SHIFT_OF * step] = mean * max_value;
    } else {
        a = divided(1, exact_product(std, max_value));
        m = exact_product(mean, max_value);
        k[SHIFT_OF * step] = -mean / std;
    }
    k[MEAN * step] = m.high;
    k[MEAN_REST * step] = is_number(m.low) ? m.low : 0;
    k[SCALE_OF * step] = a.high < 0x1.fffffffffffffp+1023 ? a.high : 0x1.fffffffffffffp+1023;
    k[SCALE_REST * step] = is_number(a.low) ? a.low : 0;
}

/* Is every product of `exact` and `split` far from the ends of the range? */
static inline int is_usual(const double *k, ptrdiff_t step)
{
    double m = fabs(k[MEAN * step]), a = k[SCALE_OF * step];
    return a > 0x1p-400 && a < 0x1p400 && m < 0x1p400;
}

static inline int can_split(const double *k, ptrdiff_t step)
{
    double m = fabs(k[MEAN * step]), a = k[SCALE_OF * step];
    return a > 0x1p-90 && a < 0x1p90 && m < 0x1p17;
}

typedef struct {
    float first, rest, shift;
    int32_t mean;       /* the nearest integer */
} Split;

static inline Split split_of(const double *k, ptrdiff_t step)
{
    double m = k[MEAN * step], a = k[SCALE_OF * step], first = a;
    double whole = (m + 0x1.8p52) - 0x1.8p52;
    uint64_t bits;
    /* An integer less a mean of less than 2**17 has 18 bits; so 6 are left of 24. */
    memcpy(&bits, &first, sizeof bits);
    bits &= ~(((uint64_t)1 << 47) - 1);
    memcpy(&first, &bits, sizeof bits);
    return (Split){(float)first, (float)(a - first), (float)((whole - m) * a), (int32_t)whole};
}

/* ---- elements <-> float32, float64 ---- */

static inline uint16_t finite_to_bfloat16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t to_bfloat16(float x)
{
    /* Of a NaN the sum might be infinite, or carry. */
    return x == x ? finite_to_bfloat16(x) : (uint16_t)0x7fc0;
}

static inline float of_bfloat16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float number;
    memcpy(&number, &bits, sizeof bits);
    return number;
}

static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
static inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, sizeof x); return bits; }

static inline float of_float16(uint16_t x)
{
    uint32_t size = (uint32_t)(x & 0x7fff) << 13;
    float finite = as_float(size) * 0x1p112f;
    uint32_t bits = size >= 0x7c00 << 13 ? size | 0x7f800000 : as_bits(finite);
    return as_float(bits | (uint32_t)(x & 0x8000) << 16);
}

static inline uint16_t to_float16(float x)
{
    uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    /* 0.5 has 2**-24 in its last place, as subnormals have. */
    uint32_t small = as_bits(as_float(size) + 0.5f) - as_bits(0.5f);
    uint32_t usual = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
    uint32_t result = size < 0x38800000 ? small : usual;
    uint32_t other = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    return (uint16_t)((size < 0x47800000 ? result : other) | sign);
}

typedef uint16_t float16;
typedef uint16_t bfloat16;

static void floats_to_float16(const float *x, uint16_t *y, ptrdiff_t n)
{
    ptrdiff_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(y + i), _mm512_cvtps_ph(_mm512_loadu_ps(x + i), 0));
#endif
#if defined(__F16C__) && defined(__AVX__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
#endif
    for (; i < n; i++)
        y[i] = to_float16(x[i]);
}

static void floats_to_bfloat16(const float *x, uint16_t *y, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++)
        y[i] = to_bfloat16(x[i]);
}

/* In the order of fastbn_dtype, from 1 on. */
enum { TYPES = 8 };
static const uint8_t size_of_type[TYPES + 1] = {0, 4, 8, 2, 2, 1, 1, 2, 2};

#define SAME(x) (x)
#define DEFINE_UNPACK(name, type, widened) \
static void unpack_##name(const void *from, ptrdiff_t n, double *to) \
{ \
    const type *x = (const type *)from; \
    for (ptrdiff_t i = 0; i < n; i++) \
        to[i] = (double)widened(x[i]); \
}
DEFINE_UNPACK(float32, float, SAME)
DEFINE_UNPACK(float64, double, SAME)
DEFINE_UNPACK(float16, uint16_t, of_float16)
DEFINE_UNPACK(bfloat16, uint16_t, of_bfloat16)
DEFINE_UNPACK(uint8, uint8_t, SAME)
DEFINE_UNPACK(int8, int8_t, SAME)
DEFINE_UNPACK(uint16, uint16_t, SAME)
DEFINE_UNPACK(int16, int16_t, SAME)

typedef void (*Unpack)(const void *from, ptrdiff_t n, double *to);
static const Unpack unpack_as[TYPES + 1] = {
    NULL, unpack_float32, unpack_float64, unpack_float16, unpack_bfloat16, unpack_uint8,
    unpack_int8, unpack_uint16, unpack_int16};

static void pack_float32(const double *x, ptrdiff_t n, void *to)
{
    float *y = (float *)to;
    for (ptrdiff_t i = 0; i < n; i++)
        y[i] = (float)x[i];
}

static void pack_float64(const double *x, ptrdiff_t n, void *to)
{ memcpy(to, x, (size_t)n * sizeof(double)); }

#define DEFINE_PACK_HALF(name) \
static void pack_##name(const double *x, ptrdiff_t n, void *to) \
{ \
    float some[PIECE]; \
    pack_float32(x, n, some); \
    floats_to_##name(some, (uint16_t *)to, n); \
}
DEFINE_PACK_HALF(float16)
DEFINE_PACK_HALF(bfloat16)

/* To the nearest integer, of two the even one; NaN to 0; what is beyond, to the ends. */
#define DEFINE_PACK_INTEGER(name, type, least, most) \
static void pack_##name(const double *x, ptrdiff_t n, void *to) \
{ \
    type *y = (type *)to; \
    for (ptrdiff_t i = 0; i < n; i++) { \
        double v = x[i] == x[i] ? x[i] : 0; \
        v = v < (least) ? (least) : v; \
        v = v > (most) ? (most) : v; \
        y[i] = (type)(int32_t)((v + 0x1.8p52) - 0x1.8p52); \
    } \
}
DEFINE_PACK_INTEGER(uint8, uint8_t, 0, 255)
DEFINE_PACK_INTEGER(int8, int8_t, -128, 127)
DEFINE_PACK_INTEGER(uint16, uint16_t, 0, 65535)
DEFINE_PACK_INTEGER(int16, int16_t, -32768, 32767)

typedef void (*Pack)(const double *x, ptrdiff_t n, void *to);
static const Pack pack_as[TYPES + 1] = {
    NULL, pack_float32, pack_float64, pack_float16, pack_bfloat16, pack_uint8, pack_int8,
    pack_uint16, pack_int16};

/* ---- the affine function, with one channel's coefficients, or a vector of each ---- */

/* `k` as above; an element's channel is the next one, if `step` is 1, or the same, if 0. */
static inline double exactly(double x, double m, double m_rest, double a, double a_rest)
{
    Pair d = exact_sum(x, -m);
    Pair p = exact_product(d.high, a);
    double rest = p.low + (d.high * a_rest + (d.low - m_rest) * a);
    double y = p.high + rest;
    return is_number(rest) ? y : p.high;      /* infinite, or NaN */
}

static inline void apply_exactly(double *x, ptrdiff_t n, const double *k, ptrdiff_t kinds,
                                 ptrdiff_t step)
{
    const double *m = k, *m_rest = k + kinds, *a = k + 2 * kinds, *a_rest = k + 3 * kinds;
    for (ptrdiff_t i = 0; i < n; i++)
        x[i] = exactly(x[i], m[i * step], m_rest[i * step], a[i * step], a_rest[i * step]);
}

static inline void apply_plainly(double *x, ptrdiff_t n, const double *k, ptrdiff_t kinds,
                                 ptrdiff_t step)
{
    const double *a = k + SCALE_OF * kinds, *b = k + SHIFT_OF * kinds;
    for (ptrdiff_t i = 0; i < n; i++)
        x[i] = x[i] * a[i * step] + b[i * step];
}

static void apply(double *x, ptrdiff_t n, const double *k, ptrdiff_t kinds, int by_channel,
                  int exact)
{
    double one[CONVERSION_KINDS];
    if (by_channel) {
        if (exact)
            apply_exactly(x, n, k, kinds, 1);
        else
            apply_plainly(x, n, k, kinds, 1);
        return;
    }
    for (int i = 0; i < CONVERSION_KINDS; i++)
        one[i] = k[i * kinds];
    if (exact)
        apply_exactly(x, n, one, 1, 0);
    else
        apply_plainly(x, n, one, 1, 0);
}

/* The product is exact, and so all the same with one instruction or two. */
#ifdef __FMA__
#define EXACT_PRODUCT_AND(a, b, c) __builtin_fmaf(a, b, c)
#else
#define EXACT_PRODUCT_AND(a, b, c) ((a) * (b) + (c))
#endif

static inline float split_number(int32_t x, Split k)
{
    float d = (float)(x - k.mean);
    return EXACT_PRODUCT_AND(d, k.first, d * k.rest + k.shift);
}

/* Sixteen at a time: past the cache, and to halves, where compilers do not find the instruction.
 * Not every CPU of the level has that for bfloat16: it is asked for each run. It takes subnormal
 * numbers for 0, and only the shift, which is y where x is the nearest integer to the mean, can
 * be one. */
#if defined(__AVX512F__)
#define BFLOAT16_TARGET __attribute__((target("avx512bf16")))

static inline __attribute__((always_inline)) __m512 split_numbers(__m512i x, Split k)
{
    __m512 d = _mm512_cvtepi32_ps(_mm512_sub_epi32(x, _mm512_set1_epi32(k.mean)));
    __m512 small = _mm512_add_ps(_mm512_mul_ps(d, _mm512_set1_ps(k.rest)),
                                 _mm512_set1_ps(k.shift));
    return _mm512_fmadd_ps(d, _mm512_set1_ps(k.first), small);
}

#define SIXTEEN_uint8(x) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(x)))
#define SIXTEEN_int8(x) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(x)))
#define SIXTEEN_uint16(x) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x)))
#define SIXTEEN_int16(x) _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(x)))

#define DEFINE_SPLIT_BY_SIXTEEN(name, type) \
static ptrdiff_t sixteens_##name##_to_float16(const type *x, ptrdiff_t n, Split k, uint16_t *y) \
{ \
    ptrdiff_t i = 0; \
    for (; i + 16 <= n; i += 16) { \
        __m512 v = split_numbers(SIXTEEN_##name(x + i), k); \
        _mm256_storeu_si256((__m256i *)(y + i), _mm512_cvtps_ph(v, 0)); \
    } \
    return i; \
} \
static void split_##name##_past_cache(const void *from, ptrdiff_t n, Split k, float *y) \
{ \
    const type *x = (const type *)from; \
    ptrdiff_t i = 0; \
    for (; i + 16 <= n; i += 16) \
        _mm512_stream_ps(y + i, split_numbers(SIXTEEN_##name(x + i), k)); \
    for (; i < n; i++) \
        y[i] = split_number(x[i], k); \
} \
BFLOAT16_TARGET static ptrdiff_t sixteens_##name##_to_bfloat16(const type *x, ptrdiff_t n, \
                                                               Split k, uint16_t *y) \
{ \
    ptrdiff_t i = 0; \
    for (; i + 16 <= n; i += 16) { \
        __m512 v = split_numbers(SIXTEEN_##name(x + i), k); \
        _mm256_storeu_si256((__m256i *)(y + i), (__m256i)_mm512_cvtneps_pbh(v)); \
    } \
    return i; \
}
DEFINE_SPLIT_BY_SIXTEEN(uint8, uint8_t)
DEFINE_SPLIT_BY_SIXTEEN(int8, int8_t)
DEFINE_SPLIT_BY_SIXTEEN(uint16, uint16_t)
DEFINE_SPLIT_BY_SIXTEEN(int16, int16_t)
#define PAST_CACHE(name) split_##name##_past_cache
#define SIXTEENS(name, half, has) ((has) ? sixteens_##name##_to_##half(x, n, k, y) : 0)
#define HAS_BFLOAT16 \
    (__builtin_cpu_supports("avx512bf16") && (k.shift == 0 || fabsf(k.shift) >= 0x1p-126f))
#else
#define PAST_CACHE(name) NULL
#define SIXTEENS(name, half, has) 0
#define HAS_BFLOAT16 0
#endif

#define DEFINE_SPLIT(name, type) \
static void split_##name(const void *from, ptrdiff_t n, Split k, float *y) \
{ \
    const type *x = (const type *)from; \
    for (ptrdiff_t i = 0; i < n; i++) \
        y[i] = split_number(x[i], k); \
} \
static void split_##name##_to_float16(const void *from, ptrdiff_t n, Split k, uint16_t *y) \
{ \
    const type *x = (const type *)from; \
    float some[PIECE]; \
    ptrdiff_t i = SIXTEENS(name, float16, 1); \
    split_##name(x + i, n - i, k, some); \
    floats_to_float16(some, y + i, n - i); \
} \
static void split_##name##_to_bfloat16(const void *from, ptrdiff_t n, Split k, uint16_t *y) \
{ \
    const type *x = (const type *)from; \
    for (ptrdiff_t i = SIXTEENS(name, bfloat16, HAS_BFLOAT16); i < n; i++) \
        y[i] = finite_to_bfloat16(split_number(x[i], k)); \
} \
static void splits_##name(const void *from, ptrdiff_t n, const float *k, ptrdiff_t kinds, float *y) \
{ \
    const type *x = (const type *)from; \
    const float *first = k, *rest = k + kinds, *shift = k + 2 * kinds, *mean = k + 3 * kinds; \
    for (ptrdiff_t i = 0; i < n; i++) { \
        float d = (float)x[i] - mean[i]; \
        y[i] = EXACT_PRODUCT_AND(d, first[i], d * rest[i] + shift[i]); \
    } \
}
DEFINE_SPLIT(uint8, uint8_t)
DEFINE_SPLIT(int8, int8_t)
DEFINE_SPLIT(uint16, uint16_t)
DEFINE_SPLIT(int16, int16_t)

typedef void (*SplitRun)(const void *from, ptrdiff_t n, Split k, float *y);
typedef void (*SplitRunToHalf)(const void *from, ptrdiff_t n, Split k, uint16_t *y);
typedef void (*SplitsRun)(const void *from, ptrdiff_t n, const float *k, ptrdiff_t kinds, float *y);
static const SplitRun split_as[TYPES + 1] = {
    NULL, NULL, NULL, NULL, NULL, split_uint8, split_int8, split_uint16, split_int16};
/* To y at the beginning of a line; NULL: not at this level. */
static const SplitRun split_past_cache_as[TYPES + 1] = {
    NULL, NULL, NULL, NULL, NULL, PAST_CACHE(uint8), PAST_CACHE(int8), PAST_CACHE(uint16),
    PAST_CACHE(int16)};
static const SplitRunToHalf split_to_float16_as[TYPES + 1] = {
    NULL, NULL, NULL, NULL, NULL, split_uint8_to_float16, split_int8_to_float16,
    split_uint16_to_float16, split_int16_to_float16};
static const SplitRunToHalf split_to_bfloat16_as[TYPES + 1] = {
    NULL, NULL, NULL, NULL, NULL, split_uint8_to_bfloat16, split_int8_to_bfloat16,
    split_uint16_to_bfloat16, split_int16_to_bfloat16};
static const SplitsRun splits_as[TYPES + 1] = {
    NULL, NULL, NULL, NULL, NULL, splits_uint8, splits_int8, splits_uint16, splits_int16};

/* ---- past the cache ---- */

#if defined(__x86_64__)
static void copy_past_cache(char *to, const char *from, size_t size)
{
    size_t before = (0 - (size_t)to) & (CACHE_LINE - 1);
    if (before >= size) {
        memcpy(to, from, size);
        return;
    }
    memcpy(to, from, before);
    to += before, from += before, size -= before;
    for (; size >= CACHE_LINE; to += CACHE_LINE, from += CACHE_LINE, size -= CACHE_LINE) {
#if defined(__AVX512F__)
        _mm512_stream_si512((void *)to, _mm512_loadu_si512(from));
#elif defined(__AVX__)
        _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
        _mm256_stream_si256((__m256i *)to + 1, _mm256_loadu_si256((const __m256i *)from + 1));
#else
        for (int i = 0; i < 4; i++)
            _mm_stream_si128((__m128i *)to + i, _mm_loadu_si128((const __m128i *)from + i));
#endif
    }
    memcpy(to, from, size);
}
static void end_past_cache(void) { _mm_sfence(); }
#else
static void copy_past_cache(char *to, const char *from, size_t size) { memcpy(to, from, size); }
static void end_past_cache(void) { }
#endif

/* ---- elements that are apart, to a matrix (rows, columns) without gaps; or from one ---- */

#define TURN(width) \
    for (ptrdiff_t i = 0; i < columns; i++) \
        for (int r = 0; r < width; r++) \
            to[r * columns + i] = x[i * width + r];
#define WEAVE(width) \
    for (ptrdiff_t i = 0; i < rows; i++) \
        for (int c = 0; c < width; c++) \
            to[i * width + c] = x[c * column + i];

#define DEFINE_GATHER(bits) \
static void gather##bits(const uint##bits##_t *restrict x, ptrdiff_t rows, ptrdiff_t columns, \
                         ptrdiff_t row, ptrdiff_t column, uint##bits##_t *restrict to) \
{ \
    if (row == 1 && column == rows && rows == 3) { \
        TURN(3) \
    } else if (row == 1 && column == rows && rows == 4) { \
        TURN(4) \
    } else if (row == 1 && columns == 3) { \
        WEAVE(3) \
    } else if (row == 1 && columns == 4) { \
        WEAVE(4) \
    } else if (row == 1) { \
        turn##bits(x, rows, columns, column, to); \
    } else { \
        for (ptrdiff_t r = 0; r < rows; r++) \
            for (ptrdiff_t c = 0; c < columns; c++) \
                to[r * columns + c] = x[r * row + c * column]; \
    } \
} \
static void scatter##bits(uint##bits##_t *x, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t row, \
                          ptrdiff_t column, const uint##bits##_t *from) \
{ \
    for (ptrdiff_t r = 0; r < rows; r++) \
        for (ptrdiff_t c = 0; c < columns; c++) \
            x[r * row + c * column] = from[r * columns + c]; \
}
DEFINE_GATHER(8)
DEFINE_GATHER(16)
DEFINE_GATHER(32)
DEFINE_GATHER(64)

static void gather(int size, const void *x, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t row,
                   ptrdiff_t column, void *to)
{
    if (size == 1)
        gather8((const uint8_t *)x, rows, columns, row, column, (uint8_t *)to);
    else if (size == 2)
        gather16((const uint16_t *)x, rows, columns, row, column, (uint16_t *)to);
    else if (size == 4)
        gather32((const uint32_t *)x, rows, columns, row, column, (uint32_t *)to);
    else
        gather64((const uint64_t *)x, rows, columns, row, column, (uint64_t *)to);
}

static void scatter(int size, void *x, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t row,
                    ptrdiff_t column, const void *from)
{
    if (size == 1)
        scatter8((uint8_t *)x, rows, columns, row, column, (const uint8_t *)from);
    else if (size == 2)
        scatter16((uint16_t *)x, rows, columns, row, column, (const uint16_t *)from);
    else if (size == 4)
        scatter32((uint32_t *)x, rows, columns, row, column, (const uint32_t *)from);
    else
        scatter64((uint64_t *)x, rows, columns, row, column, (const uint64_t *)from);
}

#endif
