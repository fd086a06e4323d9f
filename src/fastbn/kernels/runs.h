/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Sums of integers, over neighbouring elements of 8 or 16 bits, for one CPU level.
 *
 * Numbers are moved to one range first: bytes to [0, 255], words to [-32768, 32767], by an
 * exclusive or with `flip`. Sums are exact: a register is added up before it can overflow.
 * So neither the width of the registers nor the cut of the tensor changes a result.
 *
 * `keep`, where it is not NULL, has all bits or none for each element: what is not kept
 * counts as 0 in sums, and not in extremes.
 *
 * May: registers, loops over rows of neighbours. May not: threads, Python, other strides.
 */
#ifndef FASTBN_RUNS_H
#define FASTBN_RUNS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "turn.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

/* Helpers become part of the loops, which themselves are called. */
#define PART static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__BMI2__) && defined(__x86_64__)
#define RUN_BYTES 64
#elif defined(__AVX2__)
#define RUN_BYTES 32
#else
#define RUN_BYTES 16
#endif

typedef uint8_t bytes __attribute__((vector_size(RUN_BYTES)));
typedef uint16_t words __attribute__((vector_size(RUN_BYTES)));
typedef int16_t shorts __attribute__((vector_size(RUN_BYTES)));
typedef int32_t ints __attribute__((vector_size(RUN_BYTES)));
typedef uint32_t dwords __attribute__((vector_size(RUN_BYTES)));
typedef uint64_t qwords __attribute__((vector_size(RUN_BYTES)));

enum {
    MOST_COLUMNS = 512,         /* of `columns8` and `columns16` */
    MOST_ROWS = 16384,          /* of the same: so many squares of bytes fit in 31 bits */
    REGISTER_BYTES = RUN_BYTES,
    SPREAD_BYTES = 16,          /* that are written at a time, of a mask */
    BEFORE_OVERFLOW = 8192      /* registers of a run */
};

/* What a run or a column comes to. */
typedef struct {
    int64_t sum;
    uint64_t squares;
    int32_t low, high;
} Sums;

#if RUN_BYTES == 64
PART qwords sad(bytes v) { return (qwords)_mm512_sad_epu8((__m512i)v, _mm512_setzero_si512()); }
PART ints madd(shorts a, shorts b) { return (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
PART bytes min8(bytes a, bytes b) { return (bytes)_mm512_min_epu8((__m512i)a, (__m512i)b); }
PART bytes max8(bytes a, bytes b) { return (bytes)_mm512_max_epu8((__m512i)a, (__m512i)b); }
PART shorts min16(shorts a, shorts b) { return (shorts)_mm512_min_epi16((__m512i)a, (__m512i)b); }
PART shorts max16(shorts a, shorts b) { return (shorts)_mm512_max_epi16((__m512i)a, (__m512i)b); }
#elif RUN_BYTES == 32
PART qwords sad(bytes v) { return (qwords)_mm256_sad_epu8((__m256i)v, _mm256_setzero_si256()); }
PART ints madd(shorts a, shorts b) { return (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
PART bytes min8(bytes a, bytes b) { return (bytes)_mm256_min_epu8((__m256i)a, (__m256i)b); }
PART bytes max8(bytes a, bytes b) { return (bytes)_mm256_max_epu8((__m256i)a, (__m256i)b); }
PART shorts min16(shorts a, shorts b) { return (shorts)_mm256_min_epi16((__m256i)a, (__m256i)b); }
PART shorts max16(shorts a, shorts b) { return (shorts)_mm256_max_epi16((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
PART qwords sad(bytes v) { return (qwords)_mm_sad_epu8((__m128i)v, _mm_setzero_si128()); }
PART ints madd(shorts a, shorts b) { return (ints)_mm_madd_epi16((__m128i)a, (__m128i)b); }
PART bytes min8(bytes a, bytes b) { return (bytes)_mm_min_epu8((__m128i)a, (__m128i)b); }
PART bytes max8(bytes a, bytes b) { return (bytes)_mm_max_epu8((__m128i)a, (__m128i)b); }
PART shorts min16(shorts a, shorts b) { return (shorts)_mm_min_epi16((__m128i)a, (__m128i)b); }
PART shorts max16(shorts a, shorts b) { return (shorts)_mm_max_epi16((__m128i)a, (__m128i)b); }
#else
PART qwords sad(bytes v)
{
    words pairs = ((words)v & 0xff) + ((words)v >> 8);
    dwords fours = ((dwords)pairs & 0xffff) + ((dwords)pairs >> 16);
    return ((qwords)fours & 0xffffffff) + ((qwords)fours >> 32);
}
PART ints madd(shorts a, shorts b)
{
    ints low = (((ints)a << 16) >> 16) * (((ints)b << 16) >> 16);
    return (ints)((dwords)low + (dwords)(((ints)a >> 16) * ((ints)b >> 16)));
}
PART bytes min8(bytes a, bytes b) { bytes m = (bytes)(a < b); return (a & m) | (b & ~m); }
PART bytes max8(bytes a, bytes b) { bytes m = (bytes)(a < b); return (b & m) | (a & ~m); }
PART shorts min16(shorts a, shorts b) { shorts m = a < b; return (a & m) | (b & ~m); }
PART shorts max16(shorts a, shorts b) { shorts m = a < b; return (b & m) | (a & ~m); }
#endif

/* The halves of each 16 bytes of two registers by turns. */
#if RUN_BYTES == 64
PART bytes low_turns8(bytes a, bytes b)
{ return (bytes)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
PART bytes high_turns8(bytes a, bytes b)
{ return (bytes)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }
PART bytes low_turns16(bytes a, bytes b)
{ return (bytes)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
PART bytes high_turns16(bytes a, bytes b)
{ return (bytes)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
#elif RUN_BYTES == 32
PART bytes low_turns8(bytes a, bytes b)
{ return (bytes)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b); }
PART bytes high_turns8(bytes a, bytes b)
{ return (bytes)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b); }
PART bytes low_turns16(bytes a, bytes b)
{ return (bytes)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
PART bytes high_turns16(bytes a, bytes b)
{ return (bytes)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
#else
PART bytes low_turns8(bytes a, bytes b) { return LOW8(a, b); }
PART bytes high_turns8(bytes a, bytes b) { return HIGH8(a, b); }
PART bytes low_turns16(bytes a, bytes b) { return (bytes)LOW16((words)a, (words)b); }
PART bytes high_turns16(bytes a, bytes b) { return (bytes)HIGH16((words)a, (words)b); }
#endif

/* Four rows -> the four bytes of each column side by side: within each 16 columns, the first
 * four of them in the first register, ... */
PART void turn_fours(const bytes *rows, bytes *fours)
{
    bytes low = low_turns8(rows[0], rows[1]), more_low = low_turns8(rows[2], rows[3]);
    bytes high = high_turns8(rows[0], rows[1]), more_high = high_turns8(rows[2], rows[3]);
    fours[0] = low_turns16(low, more_low);
    fours[1] = high_turns16(low, more_low);
    fours[2] = low_turns16(high, more_high);
    fours[3] = high_turns16(high, more_high);
}

PART bytes load8(const uint8_t *p) { bytes v; memcpy(&v, p, sizeof v); return v; }
PART shorts load16(const void *p) { shorts v; memcpy(&v, p, sizeof v); return v; }

PART Sums no_sums(int bits)
{ return bits == 8 ? (Sums){0, 0, 255, 0} : (Sums){0, 0, 32767, -32768}; }

PART void join_extremes(Sums *to, int32_t low, int32_t high)
{
    to->low = low < to->low ? low : to->low;
    to->high = high > to->high ? high : to->high;
}

PART void join_sums(Sums *to, Sums more)
{
    to->sum += more.sum;
    to->squares += more.squares;
    join_extremes(to, more.low, more.high);
}

/* ---- one channel in registers ---- */

typedef struct {
    qwords sum;
    ints squares;
    bytes low, high;
} Bytes;

typedef struct {
    ints sum;
    qwords squares;
    shorts low, high;
} Words;

PART Bytes no_bytes(void) { return (Bytes){{0}, {0}, ~(bytes){0}, {0}}; }
PART Words no_words(void)
{ return (Words){{0}, {0}, (shorts){0} + 32767, (shorts){0} + (int16_t)-32768}; }

/* What is not kept is 0 in v. */

PART void add_extremes8(bytes *low, bytes *high, bytes v, bytes kept)
{
    *low = min8(*low, v | ~kept);
    *high = max8(*high, v);
}

PART void add_extremes16(shorts *low, shorts *high, shorts v, shorts kept)
{
    *low = min16(*low, v | (~kept & 32767));
    *high = max16(*high, v | (~kept & (int16_t)-32768));
}

/* Sums, and sums of squares, of each four bytes. */

PART ints sums_by_pairs(ints sum, bytes v)
{ return sum + madd((shorts)(((words)v & 0xff) + ((words)v >> 8)), (shorts){0} + 1); }

PART ints squares_by_pairs(ints squares, bytes v)
{
    shorts even = (shorts)((words)v & 0xff), odd = (shorts)((words)v >> 8);
    return squares + madd(even, even) + madd(odd, odd);
}

PART void add_sums_bytes(Bytes *to, bytes v)
{
    to->sum += sad(v);
    to->squares = squares_by_pairs(to->squares, v);
}

PART void add_sums_words(Words *to, shorts v)
{
    qwords squares = (qwords)madd(v, v);        /* of each two: at most 2**31 */
    to->sum += madd(v, (shorts){0} + 1);
    to->squares += (squares & 0xffffffff) + (squares >> 32);
}

PART void flush_bytes(Sums *to, const Bytes *from)
{
    for (size_t i = 0; i < RUN_BYTES / 8; i++)
        to->sum += (int64_t)from->sum[i];
    for (size_t i = 0; i < RUN_BYTES / 4; i++)
        to->squares += (uint64_t)from->squares[i];
}

PART void flush_words(Sums *to, const Words *from)
{
    for (size_t i = 0; i < RUN_BYTES / 4; i++)
        to->sum += from->sum[i];
    for (size_t i = 0; i < RUN_BYTES / 8; i++)
        to->squares += from->squares[i];
}

#if RUN_BYTES == 64
/* The same of bytes by dot products, which not every CPU of this level has: squares less 128
 * times the sum, since one factor is signed. A CPU is asked for each run. */
#define DOTS __attribute__((target("avx512vnni")))
#define HAS_DOTS __builtin_cpu_supports("avx512vnni")

typedef struct {
    ints sum, squares;
    bytes low, high;
} Dots;

PART DOTS Dots no_dots(void) { return (Dots){{0}, {0}, ~(bytes){0}, {0}}; }

PART DOTS ints dot(ints sum, bytes a, bytes b)
{ return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
PART DOTS ints sums_by_dots(ints sum, bytes v) { return dot(sum, v, (bytes){0} + 1); }
PART DOTS ints squares_by_dots(ints squares, bytes v) { return dot(squares, v, v ^ 128); }

PART DOTS void add_sums_dots(Dots *to, bytes v)
{
    to->sum = sums_by_dots(to->sum, v);
    to->squares = squares_by_dots(to->squares, v);
}

PART void flush_dots(Sums *to, const Dots *from)
{
    int64_t sum = 0, squares = 0;
    for (size_t i = 0; i < RUN_BYTES / 4; i++) {
        sum += from->sum[i];
        squares += from->squares[i];
    }
    to->sum += sum;
    to->squares += (uint64_t)(squares + 128 * sum);
}
#endif

/* ---- runs: of one channel, or of three by turns. n elements; of what is left of a register,
 * the other lanes are not kept ---- */

#define EACH_THIRD(x) x, 0, 0, x, 0, 0, x, 0, 0, x, 0, 0, x, 0, 0, x, 0, 0
static const uint8_t third8[72] = {EACH_THIRD(255), EACH_THIRD(255), EACH_THIRD(255),
                                   EACH_THIRD(255)};
static const uint16_t third16[36] = {EACH_THIRD(65535), EACH_THIRD(65535)};
/* All bits from the middle on. */
static const uint8_t beyond[2 * RUN_BYTES] = {
    [0 ... RUN_BYTES - 1] = 255, [RUN_BYTES ... 2 * RUN_BYTES - 1] = 0};

/* The lanes from c on, each third. */
PART bytes mask8(int c) { return load8(third8 + (3 - c) % 3); }
PART shorts mask16(int c) { return load16(third16 + (3 - c) % 3); }

/* Of the k-th of three registers, the lanes of channel c; of all three, channel c. */
#define LANES_OF(v, k, c) (v[k] & m[((c) + 3 - (k) * LANES % 3) % 3])
#define PICK(v, c) (LANES_OF(v, 0, c) | LANES_OF(v, 1, c) | LANES_OF(v, 2, c))

#define DEFINE_RUN(name, target, bits, element, lane, vector, accumulator, plural) \
PART target void add_##name(accumulator *to, vector v, vector kept) \
{ \
    add_sums_##plural(to, v & kept); \
    add_extremes##bits(&to->low, &to->high, v & kept, kept); \
} \
PART void flush_extremes##name(Sums *to, vector low, vector high) \
{ \
    lane lows[sizeof(vector) / sizeof(lane)], highs[sizeof(vector) / sizeof(lane)]; \
    memcpy(lows, &low, sizeof lows); \
    memcpy(highs, &high, sizeof highs); \
    lane lowest = lows[0], highest = highs[0]; \
    for (size_t i = 0; i < sizeof(vector) / sizeof(lane); i++) { \
        lowest = lows[i] < lowest ? lows[i] : lowest; \
        highest = highs[i] > highest ? highs[i] : highest; \
    } \
    join_extremes(to, lowest, highest); \
} \
PART target void some_of_run##name(const element *p, const element *keep, ptrdiff_t n, int flip, \
                                   Sums *to, int kept) \
{ \
    enum { LANES = sizeof(vector) / sizeof(element) }; \
    const vector flips = (vector){0} + (lane)flip; \
    const vector all = (vector)~(bytes){0}; \
    ptrdiff_t i = 0, end; \
    while (i < n) { \
        accumulator a = no_##plural(); \
        end = n - i > BEFORE_OVERFLOW * (ptrdiff_t)LANES ? i + BEFORE_OVERFLOW * LANES : n; \
        for (; i + LANES <= end; i += LANES) \
            add_##name(&a, load##bits(p + i) ^ flips, kept ? load##bits(keep + i) : all); \
        if (i < end) { \
            vector v = flips, k = {0}; \
            memcpy(&v, p + i, (size_t)(end - i) * sizeof(element)); \
            if (kept) \
                memcpy(&k, keep + i, (size_t)(end - i) * sizeof(element)); \
            else \
                k = (vector)load8(beyond + RUN_BYTES - (end - i) * sizeof(element)); \
            add_##name(&a, v ^ flips, k); \
            i = end; \
        } \
        flush_##plural(to, &a); \
        flush_extremes##name(to, a.low, a.high); \
    } \
} \
target static void run##name(const element *p, const element *keep, ptrdiff_t n, int flip, \
                             Sums *to) \
{ \
    if (keep != NULL) \
        some_of_run##name(p, keep, n, flip, to, 1); \
    else \
        some_of_run##name(p, keep, n, flip, to, 0); \
} \
PART target void add_thirds##name(accumulator *a, vector *v, const vector *kept, \
                                  const vector *m) \
{ \
    enum { LANES = sizeof(vector) / sizeof(element) }; \
    for (int k = 0; k < 3; k++) { \
        v[k] &= kept[k]; \
        add_extremes##bits(&a[k].low, &a[k].high, v[k], kept[k]);   /* of all channels */ \
    } \
    for (int c = 0; c < 3; c++) \
        add_sums_##plural(&a[c], PICK(v, c)); \
} \
PART target void flush_thirds##name(Sums *to, const accumulator *a) \
{ \
    enum { LANES = sizeof(vector) / sizeof(element) }; \
    const vector m[3] = {mask##bits(0), mask##bits(1), mask##bits(2)}; \
    const vector low[3] = {a[0].low, a[1].low, a[2].low}; \
    const vector high[3] = {a[0].high, a[1].high, a[2].high}; \
    for (int c = 0; c < 3; c++) { \
        flush_##plural(&to[c], &a[c]); \
        flush_extremes##name(&to[c], PICK(low, c), PICK(high, c)); \
    } \
} \
PART target void some_of_thirds##name(const element *p, const element *keep, ptrdiff_t n, \
                                      int flip, Sums *to, int kept) \
{ \
    enum { LANES = sizeof(vector) / sizeof(element) }; \
    const vector flips = (vector){0} + (lane)flip; \
    const vector all = (vector)~(bytes){0}; \
    const vector m[3] = {mask##bits(0), mask##bits(1), mask##bits(2)}; \
    ptrdiff_t i = 0, end; \
    while (i < n) { \
        accumulator a[3] = {no_##plural(), no_##plural(), no_##plural()}; \
        end = n - i > BEFORE_OVERFLOW * 3 * (ptrdiff_t)LANES ? i + BEFORE_OVERFLOW * 3 * LANES : n; \
        for (; i + 3 * LANES <= end; i += 3 * LANES) { \
            vector v[3], w[3] = {all, all, all}; \
            for (int k = 0; k < 3; k++) { \
                v[k] = load##bits(p + i + k * LANES) ^ flips; \
                if (kept) \
                    w[k] = load##bits(keep + i + k * LANES); \
            } \
            add_thirds##name(a, v, w, m); \
        } \
        if (i < end) { \
            vector v[3] = {flips, flips, flips}, w[3] = {{0}, {0}, {0}}; \
            size_t size = (size_t)(end - i) * sizeof(element); \
            memcpy(v, p + i, size); \
            if (kept) \
                memcpy(w, keep + i, size); \
            else \
                memset(w, 255, size); \
            for (int k = 0; k < 3; k++) \
                v[k] ^= flips; \
            add_thirds##name(a, v, w, m); \
            i = end; \
        } \
        flush_thirds##name(to, a); \
    } \
} \
target static void thirds##name(const element *p, const element *keep, ptrdiff_t n, int flip, \
                                Sums *to) \
{ \
    if (keep != NULL) \
        some_of_thirds##name(p, keep, n, flip, to, 1); \
    else \
        some_of_thirds##name(p, keep, n, flip, to, 0); \
}

DEFINE_RUN(16, , 16, uint16_t, int16_t, shorts, Words, words)
DEFINE_RUN(8_by_pairs, , 8, uint8_t, uint8_t, bytes, Bytes, bytes)
#ifdef HAS_DOTS
DEFINE_RUN(8_by_dots, DOTS, 8, uint8_t, uint8_t, bytes, Dots, dots)
#define RUN8(kind) (HAS_DOTS ? kind##8_by_dots : kind##8_by_pairs)
#else
#define RUN8(kind) kind##8_by_pairs
#endif

static void run8(const uint8_t *p, const uint8_t *keep, ptrdiff_t n, int flip, Sums *to)
{ RUN8(run)(p, keep, n, flip, to); }
static void thirds8(const uint8_t *p, const uint8_t *keep, ptrdiff_t n, int flip, Sums *to)
{ RUN8(thirds)(p, keep, n, flip, to); }

/* ---- one channel, or three by turns, and a byte of a mask for each pixel: not 0 where it counts.
 * The mask is spread in registers ---- */

#if RUN_BYTES == 64
typedef __mmask64 Marks;

/* From every third bit on, three alike. */
PART uint64_t by_three(uint64_t bits, int first)
{ return _pdep_u64(bits, (uint64_t)0x9249249249249249 << first) * 7; }
PART Marks load_marks(const uint8_t *p)
{ __m512i v = _mm512_loadu_si512(p); return _mm512_test_epi8_mask(v, v); }
PART void spread_marks(Marks m, Marks *of)
{
    of[0] = by_three(m, 0);
    of[1] = by_three(m >> 22, 2) | (m >> 21 & 1) * 3;   /* its first two bytes are of pixel 21 */
    of[2] = by_three(m >> 43, 1) | (m >> 42 & 1);
}
PART ptrdiff_t count_of_marks(Marks m) { return __builtin_popcountll(m); }
PART bytes marked(bytes v, Marks m) { return (bytes)_mm512_maskz_mov_epi8(m, (__m512i)v); }
PART bytes min_of_marked(bytes low, bytes v, Marks m)
{ return (bytes)_mm512_mask_min_epu8((__m512i)low, m, (__m512i)low, (__m512i)v); }
#else
typedef bytes Marks;

#define THIRD(k, i) ((k) * RUN_BYTES + (i)) / 3
#define FOUR_THIRDS(k, i) THIRD(k, i), THIRD(k, i + 1), THIRD(k, i + 2), THIRD(k, i + 3)
#define THIRDS_FROM(k, i) \
    FOUR_THIRDS(k, i), FOUR_THIRDS(k, i + 4), FOUR_THIRDS(k, i + 8), FOUR_THIRDS(k, i + 12)
#if RUN_BYTES == 32
#define THIRDS(k) THIRDS_FROM(k, 0), THIRDS_FROM(k, 16)
#else
#define THIRDS(k) THIRDS_FROM(k, 0)
#endif

PART Marks load_marks(const uint8_t *p) { return (bytes)(load8(p) != 0); }
PART void spread_marks(Marks m, Marks *of)
{
    of[0] = __builtin_shufflevector(m, m, THIRDS(0));
    of[1] = __builtin_shufflevector(m, m, THIRDS(1));
    of[2] = __builtin_shufflevector(m, m, THIRDS(2));
}
PART ptrdiff_t count_of_marks(Marks m)
{
    qwords sums = sad(m & 1);
    ptrdiff_t count = 0;
    for (size_t i = 0; i < RUN_BYTES / 8; i++)
        count += (ptrdiff_t)sums[i];
    return count;
}
PART bytes marked(bytes v, Marks m) { return v & m; }
PART bytes min_of_marked(bytes low, bytes v, Marks m) { return min8(low, v | ~m); }
#endif

/* `channels` is 1 or 3, and known to the compiler. */
#define DEFINE_MARKED(by, target, accumulator, plural) \
PART target ptrdiff_t add_marked_##by(accumulator *a, const uint8_t *p, const uint8_t *mask, \
                                      bytes flips, const bytes *m, int channels) \
{ \
    enum { LANES = RUN_BYTES }; \
    Marks marks = load_marks(mask), of[3] = {marks, marks, marks}; \
    bytes v[3] = {{0}, {0}, {0}}; \
    if (channels == 3) \
        spread_marks(marks, of); \
    for (int k = 0; k < channels; k++) { \
        v[k] = marked(load8(p + k * LANES) ^ flips, of[k]); \
        a[k].low = min_of_marked(a[k].low, v[k], of[k]);        /* of all channels */ \
        a[k].high = max8(a[k].high, v[k]); \
    } \
    for (int c = 0; c < channels; c++) \
        add_sums_##plural(&a[c], channels == 3 ? PICK(v, c) : v[0]); \
    return count_of_marks(marks); \
} \
PART target ptrdiff_t some_marked_##by(const uint8_t *p, const uint8_t *mask, ptrdiff_t n, \
                                       int flip, Sums *to, int channels) \
{ \
    enum { LANES = RUN_BYTES }; \
    const bytes flips = (bytes){0} + (uint8_t)flip, m[3] = {mask8(0), mask8(1), mask8(2)}; \
    ptrdiff_t i = 0, end, count = 0; \
    while (i < n) { \
        accumulator a[3] = {no_##plural(), no_##plural(), no_##plural()}; \
        end = n - i > BEFORE_OVERFLOW * (ptrdiff_t)LANES ? i + BEFORE_OVERFLOW * LANES : n; \
        for (; i + LANES <= end; i += LANES) \
            count += add_marked_##by(a, p + channels * i, mask + i, flips, m, channels); \
        if (i < end) { \
            uint8_t rest[3 * LANES] = {0}, marks[LANES] = {0}; \
            memcpy(rest, p + channels * i, (size_t)(channels * (end - i))); \
            memcpy(marks, mask + i, (size_t)(end - i)); \
            count += add_marked_##by(a, rest, marks, flips, m, channels); \
            i = end; \
        } \
        if (channels == 3) { \
            flush_thirds8_##by(to, a); \
        } else { \
            flush_##plural(to, a); \
            flush_extremes8_##by(to, a[0].low, a[0].high); \
        } \
    } \
    return count; \
} \
target static ptrdiff_t marked_run8_##by(const uint8_t *p, const uint8_t *mask, ptrdiff_t n, \
                                         int flip, Sums *to) \
{ return some_marked_##by(p, mask, n, flip, to, 1); } \
target static ptrdiff_t marked_thirds8_##by(const uint8_t *p, const uint8_t *mask, ptrdiff_t n, \
                                            int flip, Sums *to) \
{ return some_marked_##by(p, mask, n, flip, to, 3); }

DEFINE_MARKED(by_pairs, , Bytes, bytes)
#ifdef HAS_DOTS
DEFINE_MARKED(by_dots, DOTS, Dots, dots)
#endif

/* Of n pixels: how many count. */
static ptrdiff_t marked_run8(const uint8_t *p, const uint8_t *mask, ptrdiff_t n, int flip,
                             Sums *to)
{ return RUN8(marked_run)(p, mask, n, flip, to); }
static ptrdiff_t marked_thirds8(const uint8_t *p, const uint8_t *mask, ptrdiff_t n, int flip,
                                Sums *to)
{ return RUN8(marked_thirds)(p, mask, n, flip, to); }

/* ---- columns: of rows a step apart, each column by itself ---- */

#define DEFINE_COLUMN_VECTOR(by, target, less) \
PART target void some_of_column_vector8_##by(const uint8_t *p, const uint8_t *keep, \
                                             ptrdiff_t rows, ptrdiff_t step, int flip, Sums *to, \
                                             int kept) \
{ \
    const bytes flips = (bytes){0} + (uint8_t)flip, all = ~(bytes){0}; \
    ints sum[4] = {{0}, {0}, {0}, {0}}, squares[4] = {{0}, {0}, {0}, {0}}; \
    bytes low = all, high = {0}; \
    for (ptrdiff_t r = 0; r < rows; r += 4) { \
        bytes v[4] = {{0}, {0}, {0}, {0}}, fours[4]; \
        for (int k = 0; k < 4; k++) { \
            if (r + k < rows) { \
                bytes some = kept ? load8(keep + (r + k) * step) : all; \
                v[k] = (load8(p + (r + k) * step) ^ flips) & some; \
                add_extremes8(&low, &high, v[k], some); \
            } \
        } \
        turn_fours(v, fours); \
        for (int k = 0; k < 4; k++) { \
            sum[k] = sums_##by(sum[k], fours[k]); \
            squares[k] = squares_##by(squares[k], fours[k]); \
        } \
    } \
    for (size_t i = 0; i < RUN_BYTES; i++) { \
        int32_t s = sum[i / 4 % 4][i / 16 * 4 + i % 4]; \
        int32_t q = squares[i / 4 % 4][i / 16 * 4 + i % 4]; \
        to[i] = (Sums){s, (uint64_t)((int64_t)q + less * s), low[i], high[i]}; \
    } \
} \
target static void column_vector8_##by(const uint8_t *p, const uint8_t *keep, ptrdiff_t rows, \
                                       ptrdiff_t step, int flip, Sums *to) \
{ \
    if (keep != NULL) \
        some_of_column_vector8_##by(p, keep, rows, step, flip, to, 1); \
    else \
        some_of_column_vector8_##by(p, NULL, rows, step, flip, to, 0); \
}

DEFINE_COLUMN_VECTOR(by_pairs, , 0)
#ifdef HAS_DOTS
DEFINE_COLUMN_VECTOR(by_dots, DOTS, 128)
#endif

static void column_vector8(const uint8_t *p, const uint8_t *keep, ptrdiff_t rows, ptrdiff_t step,
                           int flip, Sums *to)
{ RUN8(column_vector)(p, keep, rows, step, flip, to); }

PART void some_of_column_vector16(const uint16_t *p, const uint16_t *keep, ptrdiff_t rows,
                                  ptrdiff_t step, int flip, Sums *to, int kept)
{
    const shorts flips = (shorts){0} + (int16_t)flip, all = (shorts)~(bytes){0};
    const shorts first = (shorts)((dwords){0} + 0xffff), last = ~first;
    ints sum[2] = {{0}, {0}};
    qwords squares[4] = {{0}, {0}, {0}, {0}};
    shorts low = (shorts){0} + 32767, high = (shorts){0} + (int16_t)-32768;
    for (ptrdiff_t r = 0; r < rows; r++) {
        shorts k = kept ? load16(keep + r * step) : all;
        shorts some = (load16(p + r * step) ^ flips) & k;
        qwords even_squares = (qwords)madd(some, some & first);
        qwords odd_squares = (qwords)madd(some, some & last);
        sum[0] += (ints)((dwords)some << 16) >> 16;
        sum[1] += (ints)some >> 16;
        squares[0] += even_squares & 0xffffffff;
        squares[1] += odd_squares & 0xffffffff;
        squares[2] += even_squares >> 32;
        squares[3] += odd_squares >> 32;
        add_extremes16(&low, &high, some, k);
    }
    for (size_t i = 0; i < RUN_BYTES / 2; i++)
        to[i] = (Sums){sum[i % 2][i / 2], squares[i % 4][i / 4], low[i], high[i]};
}

static void column_vector16(const uint16_t *p, const uint16_t *keep, ptrdiff_t rows,
                            ptrdiff_t step, int flip, Sums *to)
{
    if (keep != NULL)
        some_of_column_vector16(p, keep, rows, step, flip, to, 1);
    else
        some_of_column_vector16(p, NULL, rows, step, flip, to, 0);
}

/* Of at most MOST_COLUMNS columns and MOST_ROWS rows. */
#define DEFINE_COLUMNS(bits, element, shift) \
static void columns##bits(const element *p, const element *keep, ptrdiff_t rows, \
                          ptrdiff_t columns, ptrdiff_t step, int flip, Sums *to) \
{ \
    enum { LANES = RUN_BYTES / sizeof(element) }; \
    if (columns < LANES) { \
        for (ptrdiff_t j = 0; j < columns; j++) { \
            to[j] = no_sums(bits); \
            for (ptrdiff_t r = 0; r < rows; r++) { \
                int32_t x = shift((element)(p[r * step + j] ^ (element)flip)); \
                if (keep == NULL || keep[r * step + j]) \
                    join_sums(&to[j], (Sums){x, (uint64_t)((int64_t)x * x), x, x}); \
            } \
        } \
        return; \
    } \
    for (ptrdiff_t j = 0; j < columns; j += LANES) { \
        ptrdiff_t at = j + LANES <= columns ? j : columns - LANES; \
        column_vector##bits(p + at, keep != NULL ? keep + at : NULL, rows, step, flip, to + at); \
    } \
}

DEFINE_COLUMNS(8, uint8_t, (int32_t))
DEFINE_COLUMNS(16, uint16_t, (int32_t)(int16_t))


/* ---- masks: a byte for each element or pixel, not 0 where it counts -> `keep` ---- */

typedef uint8_t marks __attribute__((vector_size(SPREAD_BYTES)));

/* Three bytes for each of n marks, of as many as fill registers: how many these are. */
static ptrdiff_t spread_by_three(const uint8_t *restrict mask, ptrdiff_t n, uint8_t *restrict keep)
{
    ptrdiff_t i = 0;
    for (; i + SPREAD_BYTES <= n; i += SPREAD_BYTES) {
        marks m, first, second, third;
        memcpy(&m, mask + i, sizeof m);
        m = (marks)(m != 0);
        first = __builtin_shufflevector(m, m, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5);
        second = __builtin_shufflevector(m, m, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10);
        third = __builtin_shufflevector(m, m, 10, 11, 11, 11, 12, 12, 12, 13, 13, 13, 14, 14, 14,
                                        15, 15, 15);
        memcpy(keep + 3 * i, &first, sizeof first);
        memcpy(keep + 3 * i + SPREAD_BYTES, &second, sizeof second);
        memcpy(keep + 3 * i + 2 * SPREAD_BYTES, &third, sizeof third);
    }
    return i;
}

/* Loops that become vectors. */
#define SPREAD(width) \
    for (; i < n; i++) \
        for (int j = 0; j < width; j++) \
            keep[i * width + j] = (uint8_t)-(mask[i] != 0);

/* So many bytes for each of n marks, which are a step apart. May write SPREAD_BYTES more. */
static void spread_mask(const uint8_t *restrict mask, ptrdiff_t step, ptrdiff_t n, ptrdiff_t width,
                        uint8_t *restrict keep)
{
    ptrdiff_t i = 0;
    if (step == 1 && width == 1) {
        SPREAD(1)
    } else if (step == 1 && width == 2) {
        SPREAD(2)
    } else if (step == 1 && width == 4) {
        SPREAD(4)
    } else if (step == 1 && width == 3) {
        i = spread_by_three(mask, n, keep);
    }
    for (; i < n && width <= SPREAD_BYTES; i++) {       /* the next one writes over it */
        marks all = (marks){0} - (uint8_t)(mask[i * step] != 0);
        memcpy(keep + i * width, &all, sizeof all);
    }
    for (; i < n; i++)
        memset(keep + i * width, mask[i * step] ? 255 : 0, (size_t)width);
}

/* How many of n elements of so many bytes count. */
static ptrdiff_t count_marks(const uint8_t *keep, ptrdiff_t n, ptrdiff_t size)
{
    ptrdiff_t i = 0, found = 0;
    qwords sums = {0};
    for (; i + RUN_BYTES <= n * size; i += RUN_BYTES)
        sums += sad(load8(keep + i) & 1);
    for (size_t k = 0; k < RUN_BYTES / 8; k++)
        found += (ptrdiff_t)sums[k];
    for (; i < n * size; i++)
        found += keep[i] & 1;
    return found / size;
}

#endif
