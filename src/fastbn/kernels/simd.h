/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Vector registers for one CPU level and one element type.
 *
 * The kernels are compiled once per (level, element type). This header is all
 * that differs between those builds: it turns the compiler's target into
 * `lanes` (one register of arithmetic numbers), `wides` (one register of
 * float64) and the handful of operations the kernels need on them.
 *
 * May: types, loads, stores, conversions, selects, streaming stores.
 * May not: loops, OpenMP, Python.
 *
 * No arithmetic is hidden here: sums and products are written in the kernels,
 * so that their order is read there and is the same on every level.
 */
#ifndef FASTBN_SIMD_H
#define FASTBN_SIMD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "assertions.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#if !defined(__GNUC__)
#error "fastbn needs GCC or Clang (on Windows: clang-cl): it uses their vector types"
#endif

/* A register no wider than the level's: wider vectors are lowered badly. */
#if defined(__AVX512F__) && defined(__AVX512VL__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

/* elem: what is in memory. real: what is computed with. */
#if defined(FASTBN_ELEM_FLOAT64)
typedef double elem;
typedef double real;
typedef int64_t real_bits;
#define STORED_BYTES VECTOR_BYTES
#elif defined(FASTBN_ELEM_FLOAT32)
typedef float elem;
typedef float real;
typedef int32_t real_bits;
#define STORED_BYTES VECTOR_BYTES
#else   /* 16 bits of a float16 or bfloat16 */
typedef uint16_t elem;
typedef float real;
typedef int32_t real_bits;
#define STORED_BYTES (VECTOR_BYTES / 2)
#endif

typedef real lanes __attribute__((vector_size(VECTOR_BYTES)));
typedef real_bits lane_bits __attribute__((vector_size(VECTOR_BYTES)));
typedef double wides __attribute__((vector_size(VECTOR_BYTES)));
typedef elem stored __attribute__((vector_size(STORED_BYTES)));    /* `lanes` in memory */

enum {
    WIDTH = VECTOR_BYTES / sizeof(real),        /* numbers in a `lanes` */
    WIDE = VECTOR_BYTES / sizeof(double),       /* numbers in a `wides` */
    HALVES = sizeof(double) / sizeof(real),     /* `wides` that hold one `lanes` */
    LINE = 64 / sizeof(elem),                   /* elements of a line of cache ... */
    PAGE = 4096 / sizeof(elem),                 /* ... and of a page of memory */
};

/* `lanes` of a row that are summed side by side, up to four: as many as registers are for. 1:
 * none are. */
#if VECTOR_BYTES == 64
enum { MAX_ROW_VECTORS = 4 };
#else
enum { MAX_ROW_VECTORS = 1 };
#endif

/* Squares below the first lose bits to underflow in `real`; the second is a
 * power of two near the end of its range; the third is far from any end. */
#ifdef FASTBN_ELEM_FLOAT64
#define SMALLEST_SQUARE 0x1p-960
#define LARGEST_SCALE 0x1p1000
#define USUAL_SCALE 0x1p240
#else
#define SMALLEST_SQUARE 0x1p-120
#define LARGEST_SCALE 0x1p120
#define USUAL_SCALE 0x1p30
#endif

static inline lanes set1(real x) { return x - (lanes){0}; }
static inline lanes select_lanes(lane_bits mask, lanes yes, lanes no)
{ return (lanes)((mask & (lane_bits)yes) | (~mask & (lane_bits)no)); }

/* ---- elements <-> numbers; to elements with rounding to nearest even ---- */

#if STORED_BYTES == VECTOR_BYTES
static inline lanes unpack(stored v) { return v; }
static inline stored pack(lanes v) { return v; }
#else
typedef uint32_t lane_words __attribute__((vector_size(VECTOR_BYTES)));

/* 16 bits <-> 32 bits of which the upper ones are 0. */
#if VECTOR_BYTES == 64
static inline lane_words to_32_bits(stored v)
{ return (lane_words)_mm512_cvtepu16_epi32((__m256i)v); }
static inline stored to_16_bits(lane_words v) { return (stored)_mm512_cvtepi32_epi16((__m512i)v); }
#elif VECTOR_BYTES == 32
static inline lane_words to_32_bits(stored v)
{ return (lane_words)_mm256_cvtepu16_epi32((__m128i)v); }
static inline stored to_16_bits(lane_words v)
{
    return (stored)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v),
                                    _mm256_extracti128_si256((__m256i)v, 1));
}
#elif defined(__x86_64__)
static inline lane_words to_32_bits(stored v)
{ return (lane_words)_mm_cvtepu16_epi32(_mm_cvtsi64_si128((long long)v)); }
static inline stored to_16_bits(lane_words v)
{ return (stored)_mm_cvtsi128_si64(_mm_packus_epi32((__m128i)v, (__m128i)v)); }
#else
static inline lane_words to_32_bits(stored v) { return __builtin_convertvector(v, lane_words); }
static inline stored to_16_bits(lane_words v) { return __builtin_convertvector(v, stored); }
#endif

#if defined(FASTBN_ELEM_BFLOAT16)
static inline lanes unpack(stored v) { return (lanes)(to_32_bits(v) << 16); }
static inline stored pack(lanes v)
{
    /* The lower half of a NaN is 0, as elements and `as_real` have it, and cannot carry. */
    lane_words bits = (lane_words)v;
    return to_16_bits((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#elif VECTOR_BYTES == 64
static inline lanes unpack(stored v) { return (lanes)_mm512_cvtph_ps((__m256i)v); }
static inline stored pack(lanes v)
{ return (stored)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif VECTOR_BYTES == 32
static inline lanes unpack(stored v) { return (lanes)_mm256_cvtph_ps((__m128i)v); }
static inline stored pack(lanes v)
{ return (stored)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
static inline lanes unpack(stored v)
{
    lane_words half = to_32_bits(v), size = (half & 0x7fff) << 13;
    lanes finite = (lanes)size * set1(0x1p112f);
    lanes endless = (lanes)(size | 0x7f800000);
    lanes number = select_lanes((lane_bits)size >= 0x7c00 << 13, endless, finite);
    return (lanes)((lane_words)number | (half & 0x8000) << 16);
}
static inline stored pack(lanes v)
{
    lane_words bits = (lane_words)v, sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    lanes half = set1(0.5f);       /* has 2**-24 in its last place, as subnormals have */
    lanes small = (lanes)((lane_words)((lanes)size + half) - (lane_words)half);
    lanes usual = (lanes)((size + 0xfff + (size >> 13 & 1) - (112 << 23)) >> 13);
    lanes other = (lanes)(0x7c00 + ((lane_words)((lane_bits)size > 0x7f800000) & 0x200));
    lanes result = select_lanes((lane_bits)size < 0x38800000, small, usual);
    result = select_lanes((lane_bits)size < 0x47800000, result, other);
    return to_16_bits((lane_words)result | sign);
}
#endif
#endif

/* Is a float64 rounded once to an element? bfloat16 is made of float32, by ml_dtypes. */
#if defined(FASTBN_ELEM_FLOAT16)
enum { ROUNDED_ONCE = 1 };
#else
enum { ROUNDED_ONCE = 0 };
#endif
#if STORED_BYTES == VECTOR_BYTES
static inline double as_double(elem x) { return (double)x; }
#else
static inline double as_double(elem x) { return (double)unpack((stored){x})[0]; }
#endif
static inline real first_lane(lanes v) { return v[0]; }
static inline real as_real(double x)
{
    real r = (real)x;       /* first: a loop in which there is a choice to convert is scalar */
    return r == r ? r : (real)__builtin_nan("");
}

/* ---- memory; no alignment is assumed beyond the element's own ---- */

typedef stored stored_in_memory __attribute__((aligned(sizeof(elem)), may_alias));
typedef lanes lanes_in_memory __attribute__((aligned(sizeof(real)), may_alias));
typedef wides wides_in_memory __attribute__((aligned(sizeof(double)), may_alias));

static inline lanes load(const elem *p) { return unpack(*(const stored_in_memory *)p); }
static inline lanes load_real(const real *p) { return *(const lanes_in_memory *)p; }
static inline void store(elem *p, lanes v) { *(stored_in_memory *)p = pack(v); }
static inline void store_real(real *p, lanes v) { *(lanes_in_memory *)p = v; }
static inline wides load_wide(const double *p) { return *(const wides_in_memory *)p; }
static inline void store_wide(double *p, wides v) { *(wides_in_memory *)p = v; }

/* The first n <= WIDTH numbers; memory past them is neither read nor written, and
 * `fill` is what a load has in their place. */
#if VECTOR_BYTES == 64 && defined(FASTBN_ELEM_FLOAT32)
static inline lanes load_n_or(const elem *p, ptrdiff_t n, lanes fill)
{ return (lanes)_mm512_mask_loadu_ps((__m512)fill, (__mmask16)((1u << n) - 1), p); }
#elif VECTOR_BYTES == 64 && defined(FASTBN_ELEM_FLOAT64)
static inline lanes load_n_or(const elem *p, ptrdiff_t n, lanes fill)
{ return (lanes)_mm512_mask_loadu_pd((__m512d)fill, (__mmask8)((1u << n) - 1), p); }
#elif VECTOR_BYTES == 64
static inline lanes load_n_or(const elem *p, ptrdiff_t n, lanes fill)
{
    __mmask16 mask = (__mmask16)((1u << n) - 1);
    return unpack((stored)_mm256_mask_loadu_epi16((__m256i)pack(fill), mask, p));
}
#elif VECTOR_BYTES == 32 && defined(FASTBN_ELEM_FLOAT32)
static inline __m256i first_n_mask(ptrdiff_t n)
{ return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
static inline lanes load_n_or(const elem *p, ptrdiff_t n, lanes fill)
{
    __m256i mask = first_n_mask(n);
    return (lanes)_mm256_blendv_ps((__m256)fill, _mm256_maskload_ps(p, mask), (__m256)mask);
}
#elif VECTOR_BYTES == 32 && defined(FASTBN_ELEM_FLOAT64)
static inline __m256i first_n_mask(ptrdiff_t n)
{ return _mm256_cmpgt_epi64(_mm256_set1_epi64x((long long)n), _mm256_setr_epi64x(0, 1, 2, 3)); }
static inline lanes load_n_or(const elem *p, ptrdiff_t n, lanes fill)
{
    __m256i mask = first_n_mask(n);
    return (lanes)_mm256_blendv_pd((__m256d)fill, _mm256_maskload_pd(p, mask), (__m256d)mask);
}
#else
static inline lanes load_n_or(const elem *p, ptrdiff_t n, lanes fill)
{
    stored v;
    if (n >= WIDTH)
        return load(p);
    v = pack(fill);
    memcpy(&v, p, (size_t)n * sizeof(elem));
    return unpack(v);
}
#endif

/* Without masks: a masked store to a line that is not in the cache holds up the streaming
 * stores that follow it. */
static inline void store_piece(char **to, const char **from, size_t size, size_t piece)
{
    if (piece < sizeof(elem) || piece > STORED_BYTES || !(size & piece))
        return;
    memcpy(*to, *from, piece);
    *to += piece;
    *from += piece;
}

static inline void store_n(elem *p, lanes v, ptrdiff_t n)
{
    stored some = pack(v);
    const char *from = (const char *)&some;
    char *to = (char *)p;
    size_t size = (size_t)n * sizeof(elem);
    store_piece(&to, &from, size, 64);
    store_piece(&to, &from, size, 32);
    store_piece(&to, &from, size, 16);
    store_piece(&to, &from, size, 8);
    store_piece(&to, &from, size, 4);
    store_piece(&to, &from, size, 2);
}

/* The first n <= WIDTH of numbers that are no elements, and zeros. */
#if STORED_BYTES == VECTOR_BYTES
static inline lanes load_real_n(const real *p, ptrdiff_t n)
{ return load_n_or(p, n, set1(0)); }
#elif VECTOR_BYTES == 64
static inline lanes load_real_n(const real *p, ptrdiff_t n)
{ return (lanes)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
#else
static inline lanes load_real_n(const real *p, ptrdiff_t n)
{
    lanes v = {0};
    memcpy(&v, p, (size_t)n * sizeof(real));
    return v;
}
#endif

/* ---- streaming stores: past the cache, p aligned to STORED_BYTES ---- */

#if defined(__x86_64__) && STORED_BYTES == 64
static inline void stream(elem *p, lanes v) { _mm512_stream_si512((void *)p, (__m512i)pack(v)); }
#elif defined(__x86_64__) && STORED_BYTES == 32
static inline void stream(elem *p, lanes v) { _mm256_stream_si256((void *)p, (__m256i)pack(v)); }
#elif defined(__x86_64__) && STORED_BYTES == 16
static inline void stream(elem *p, lanes v) { _mm_stream_si128((void *)p, (__m128i)pack(v)); }
#elif defined(__x86_64__)
static inline void stream(elem *p, lanes v) { _mm_stream_si64((void *)p, (long long)pack(v)); }
#else
static inline void stream(elem *p, lanes v) { store(p, v); }
#endif

#if defined(__x86_64__)
static inline void flush_stream(void) { _mm_sfence(); }
#else
static inline void flush_stream(void) { }
#endif

/* A hint: the line of memory at p, which may lie past the array. */
static inline void prefetch(const elem *p, ptrdiff_t distance)
{ __builtin_prefetch((const char *)((uintptr_t)p + (uintptr_t)(distance * (ptrdiff_t)sizeof(elem))), 0, 2); }

/* How many elements from p to the next address a streaming store accepts. */
static inline ptrdiff_t to_alignment(const elem *p)
{ return (ptrdiff_t)((0 - (uintptr_t)p / sizeof(elem)) % WIDTH); }

/* How many to the next line of the cache. */
static inline ptrdiff_t to_line(const elem *p)
{ return (ptrdiff_t)((0 - (uintptr_t)p / sizeof(elem)) % LINE); }

/* ---- a + b, exactly so, but by the multiplier where it can add: sums keep the
 * adders busy, and leave it idle ---- */

#if VECTOR_BYTES == 64 && !defined(FASTBN_ELEM_FLOAT64)
static inline lanes add(lanes a, lanes b)
{ return (lanes)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(1), (__m512)b); }
#elif VECTOR_BYTES == 64
static inline lanes add(lanes a, lanes b)
{ return (lanes)_mm512_fmadd_pd((__m512d)a, _mm512_set1_pd(1), (__m512d)b); }
#elif VECTOR_BYTES == 32 && defined(__FMA__) && !defined(FASTBN_ELEM_FLOAT64)
static inline lanes add(lanes a, lanes b)
{ return (lanes)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(1), (__m256)b); }
#elif VECTOR_BYTES == 32 && defined(__FMA__)
static inline lanes add(lanes a, lanes b)
{ return (lanes)_mm256_fmadd_pd((__m256d)a, _mm256_set1_pd(1), (__m256d)b); }
#else
static inline lanes add(lanes a, lanes b) { return a + b; }
#endif

/* v, in a register: compilers like to read twice what has been read, since a load
 * can be part of another instruction; but a load that crosses a line costs two. */
#if defined(__AVX512F__)
static inline lanes force_register(lanes v) { __asm__("" : "+v"(v)); return v; }
#elif defined(__SSE2__)
static inline lanes force_register(lanes v) { __asm__("" : "+x"(v)); return v; }
#else
static inline lanes force_register(lanes v) { return v; }
#endif

/* f(context, v, w), by a call: f is long, and not to be a part of each loop that may need it. */
static __attribute__((noinline)) lanes call_noinline(
    lanes (*f)(const void *context, lanes v, lanes w), const void *context, lanes v, lanes w)
{ return f(context, v, w); }

/* ---- wider numbers, and selects ---- */

#ifdef FASTBN_ELEM_FLOAT64
static inline wides widen(lanes v, int half) { (void)half; return v; }
#else
/* Vector conversions of GCC 12 go by halves of halves: hence intrinsics. */
#if VECTOR_BYTES == 64
static inline wides widen(lanes v, int half)
{
    return (wides)_mm512_cvtps_pd(half ? _mm512_extractf32x8_ps((__m512)v, 1)
                                       : _mm512_castps512_ps256((__m512)v));
}
#elif VECTOR_BYTES == 32
static inline wides widen(lanes v, int half)
{
    return (wides)_mm256_cvtps_pd(half ? _mm256_extractf128_ps((__m256)v, 1)
                                       : _mm256_castps256_ps128((__m256)v));
}
#elif defined(__SSE2__)
static inline wides widen(lanes v, int half)
{
    __m128 x = (__m128)v;
    return (wides)_mm_cvtps_pd(half ? _mm_movehl_ps(x, x) : x);
}
#else
typedef float half_lanes __attribute__((vector_size(VECTOR_BYTES / 2)));
static inline wides widen(lanes v, int half)
{
    half_lanes h = half ? __builtin_shufflevector(v, v, 2, 3) : __builtin_shufflevector(v, v, 0, 1);
    return __builtin_convertvector(h, wides);
}
#endif
#endif

/* ((a + b) + (c + d)) + ((e + f) + (g + h)) of eight numbers in a row of registers. */
#if VECTOR_BYTES >= 32
static inline double sum_of_eight(const wides *v)
{
#if VECTOR_BYTES == 64
    __m256d first = _mm512_castpd512_pd256((__m512d)v[0]);
    __m256d other = _mm512_extractf64x4_pd((__m512d)v[0], 1);
#else
    __m256d first = (__m256d)v[0], other = (__m256d)v[1];
#endif
    __m256d twos = _mm256_hadd_pd(first, other);
    __m128d fours = _mm_add_pd(_mm256_castpd256_pd128(twos), _mm256_extractf128_pd(twos, 1));
    return fours[0] + fours[1];
}
#else
static inline double sum_of_eight(const wides *v)
{
    return ((v[0][0] + v[0][1]) + (v[1][0] + v[1][1])) + ((v[2][0] + v[2][1]) + (v[3][0] + v[3][1]));
}
#endif

/* The first n lanes of one, the others of another. */
static inline lanes blend_at(lanes first, lanes other, ptrdiff_t n)
{
    static const real_bits numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    lane_bits lane;
    assert_constant(sizeof lane <= sizeof numbers);
    memcpy(&lane, numbers, sizeof lane);
    return select_lanes(lane < (real_bits)n, first, other);
}

/* a < b ? a : b, and a < b ? b : a; where either is NaN: b, and a. And where a <= b, the
 * one, elsewhere, and where either is NaN, the other. */
#if VECTOR_BYTES == 64 && defined(FASTBN_ELEM_FLOAT64)
static inline lanes min_lanes(lanes a, lanes b) { return (lanes)_mm512_min_pd((__m512d)a, (__m512d)b); }
static inline lanes max_lanes(lanes a, lanes b) { return (lanes)_mm512_max_pd((__m512d)b, (__m512d)a); }
static inline lanes select_le(lanes a, lanes b, lanes one, lanes other)
{
    return (lanes)_mm512_mask_blend_pd(_mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ),
                                       (__m512d)other, (__m512d)one);
}
#elif VECTOR_BYTES == 64
static inline lanes min_lanes(lanes a, lanes b) { return (lanes)_mm512_min_ps((__m512)a, (__m512)b); }
static inline lanes max_lanes(lanes a, lanes b) { return (lanes)_mm512_max_ps((__m512)b, (__m512)a); }
static inline lanes select_le(lanes a, lanes b, lanes one, lanes other)
{
    return (lanes)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ),
                                       (__m512)other, (__m512)one);
}
#elif VECTOR_BYTES == 32 && defined(FASTBN_ELEM_FLOAT64)
static inline lanes min_lanes(lanes a, lanes b) { return (lanes)_mm256_min_pd((__m256d)a, (__m256d)b); }
static inline lanes max_lanes(lanes a, lanes b) { return (lanes)_mm256_max_pd((__m256d)b, (__m256d)a); }
static inline lanes select_le(lanes a, lanes b, lanes one, lanes other)
{ return (lanes)_mm256_blendv_pd((__m256d)other, (__m256d)one, (__m256d)(a <= b)); }
#elif VECTOR_BYTES == 32
static inline lanes min_lanes(lanes a, lanes b) { return (lanes)_mm256_min_ps((__m256)a, (__m256)b); }
static inline lanes max_lanes(lanes a, lanes b) { return (lanes)_mm256_max_ps((__m256)b, (__m256)a); }
static inline lanes select_le(lanes a, lanes b, lanes one, lanes other)
{ return (lanes)_mm256_blendv_ps((__m256)other, (__m256)one, (__m256)(a <= b)); }
#else
static inline lanes min_lanes(lanes a, lanes b) { return select_lanes((lane_bits)(a < b), a, b); }
static inline lanes max_lanes(lanes a, lanes b) { return select_lanes((lane_bits)(a < b), b, a); }
static inline lanes select_le(lanes a, lanes b, lanes one, lanes other)
{ return select_lanes((lane_bits)(a <= b), one, other); }
#endif

static inline lanes neg_abs(lanes v)
{ return (lanes)((lane_bits)v | (lane_bits)set1((real)-0.0)); }
static inline lanes all_bits(void) { return (lanes)~(lane_bits){0}; }
static inline lanes no_bits(void) { return (lanes){0}; }
static inline lanes and_bits(lanes v, lanes bits) { return (lanes)((lane_bits)v & (lane_bits)bits); }

/* ---- what an exponential is made of ---- */

/* exp(-FAR) is 0. LOG_2 has zeros at its end: its product with a whole number is exact.
 * POLYNOMIAL has the least relative error, 2**-58 and 2**-28, that one of its degree with
 * 1 + x at its beginning has between -log(2) / 2 and log(2) / 2 (Remez' algorithm). */
#ifdef FASTBN_ELEM_FLOAT64
enum { FAR = 750, TERMS = 11 };
#define LOG2_E 0x1.71547652b82fep+0
#define LOG_2 0x1.62e42feep-1
#define REST_OF_LOG_2 0x1.a39ef35793c76p-33
#define WHOLE_NUMBERS 0x1.8p52      /* added to a number, leaves no place for a fraction */
#define EXPONENT_BIAS 1023
#define FRACTION_BITS 52
static const real POLYNOMIAL[TERMS + 1] = {
    1.0, 1.0, 0x1.000000000000ap-1, 0x1.55555555554fap-3, 0x1.5555555550880p-5,
    0x1.1111111127bd4p-7, 0x1.6c16c18429335p-10, 0x1.a01a012a5c042p-13, 0x1.a0199a0ee7035p-16,
    0x1.71df254c77156p-19, 0x1.28ad706015ad7p-22, 0x1.ad7f71e4d6022p-26};
#else
enum { FAR = 110, TERMS = 6 };
#define LOG2_E 0x1.715476p+0f
#define LOG_2 0x1.62e4p-1f
#define REST_OF_LOG_2 0x1.7f7d1cp-20f
#define WHOLE_NUMBERS 0x1.8p23f
#define EXPONENT_BIAS 127
#define FRACTION_BITS 23
static const real POLYNOMIAL[TERMS + 1] = {
    1.0f, 1.0f, 0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239ep-7f, 0x1.6a243ap-10f};
#endif
/* The nearest whole number, of a small one. */
static inline lanes round_to_int(lanes v)
{ return (v + set1(WHOLE_NUMBERS)) - set1(WHOLE_NUMBERS); }

/* v * 2**n for a whole n of at most twice the range of exponents, rounded once. */
#if VECTOR_BYTES == 64 && defined(FASTBN_ELEM_FLOAT64)
static inline lanes scale_by_pow2(lanes v, lanes n)
{ return (lanes)_mm512_scalef_pd((__m512d)v, (__m512d)n); }
#elif VECTOR_BYTES == 64
static inline lanes scale_by_pow2(lanes v, lanes n)
{ return (lanes)_mm512_scalef_ps((__m512)v, (__m512)n); }
#else
static inline lanes pow2(lanes n)
{ return (lanes)((lane_bits)(n + set1(WHOLE_NUMBERS + EXPONENT_BIAS)) << FRACTION_BITS); }
static inline lanes scale_by_pow2(lanes v, lanes n)
{
    lanes half = round_to_int(n * set1(0.5f));
    return v * pow2(half) * pow2(n - half);
}
#endif

/* ---- masks: a byte for each element, all of whose bits are set, or none ---- */

/* WIDTH of them as a register's bits. */
static inline lanes mask_bits(const signed char *mask)
{
#if VECTOR_BYTES == 64 && defined(FASTBN_ELEM_FLOAT64)
    return (lanes)_mm512_cvtepi8_epi64(_mm_loadl_epi64((const __m128i *)mask));
#elif VECTOR_BYTES == 64
    return (lanes)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)mask));
#elif VECTOR_BYTES == 32 && !defined(FASTBN_ELEM_FLOAT64)
    return (lanes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)mask));
#elif defined(__SSE4_1__)
    int bytes = 0;
    memcpy(&bytes, mask, WIDTH);
#if VECTOR_BYTES == 32
    return (lanes)_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(bytes));
#elif defined(FASTBN_ELEM_FLOAT64)
    return (lanes)_mm_cvtepi8_epi64(_mm_cvtsi32_si128(bytes));
#else
    return (lanes)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(bytes));
#endif
#else
    typedef signed char mask_bytes __attribute__((vector_size(WIDTH)));
    mask_bytes bytes;
    memcpy(&bytes, mask, sizeof bytes);
    return (lanes)__builtin_convertvector(bytes, lane_bits);
#endif
}

/* n of them, and up to the end of a register. */
static inline void fill_mask(signed char *to, signed char value, ptrdiff_t n)
{
    typedef signed char bytes __attribute__((vector_size(VECTOR_BYTES), aligned(1)));
    ptrdiff_t i;
    for (i = 0; i < n; i += VECTOR_BYTES)
        *(bytes *)(to + i) = value - (bytes){0};
}

static inline lanes select_bits(lanes bits, lanes one, lanes other)
{ return select_lanes((lane_bits)bits, one, other); }

/* The power of two 2**-e for a finite, normal size in [2**e, 2**(e+1)). */
static inline double inverse_pow2(double size)
{
    uint64_t bits;
    double power;
    memcpy(&bits, &size, sizeof bits);
    bits = (2046 - (bits >> 52 & 2047)) << 52;
    memcpy(&power, &bits, sizeof power);
    return power;
}

#endif
