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

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

/* Helpers become part of the loops, which themselves are called. */
#define PART static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__)
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
    MOST_ROWS = 256,            /* of the same: 256 bytes are at most 65280 */
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

PART bytes load8(const uint8_t *p) { bytes v; memcpy(&v, p, sizeof v); return v; }
PART shorts load16(const void *p) { shorts v; memcpy(&v, p, sizeof v); return v; }

PART Sums no_sums(int bits)
{ return bits == 8 ? (Sums){0, 0, 255, 0} : (Sums){0, 0, 32767, -32768}; }

PART void join_sums(Sums *to, Sums more)
{
    to->sum += more.sum;
    to->squares += more.squares;
    to->low = more.low < to->low ? more.low : to->low;
    to->high = more.high > to->high ? more.high : to->high;
}

/* ---- one channel in registers ---- */

typedef struct {
    qwords sum;
    dwords squares;
    bytes low, high;
} Bytes;

typedef struct {
    ints sum;
    qwords squares;
    shorts low, high;
} Words;

#if RUN_BYTES == 64
/* The same by dot products, which not every CPU of this level has: squares less 128 times the
 * sum, since one factor is signed. A CPU is asked for each run. */
#define DOTS __attribute__((target("avx512vnni")))
#define HAS_DOTS __builtin_cpu_supports("avx512vnni")

typedef struct {
    ints sum, squares;
    bytes low, high;
} Dots;

PART DOTS ints dot(ints sum, bytes a, bytes b)
{ return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }

PART DOTS Dots no_dots(void) { return (Dots){{0}, {0}, ~(bytes){0}, {0}}; }

PART DOTS void add_dots(Dots *to, bytes v, bytes kept)
{
    bytes some = v & kept;
    to->sum = dot(to->sum, some, (bytes){0} + 1);
    to->squares = dot(to->squares, some, some ^ 128);
    to->low = min8(to->low, v | ~kept);
    to->high = max8(to->high, some);
}
#endif

PART Bytes no_bytes(void) { return (Bytes){{0}, {0}, ~(bytes){0}, {0}}; }
PART Words no_words(void)
{ return (Words){{0}, {0}, (shorts){0} + 32767, (shorts){0} + (int16_t)-32768}; }

PART void add_bytes(Bytes *to, bytes v, bytes kept)
{
    bytes some = v & kept;
    shorts even = (shorts)((words)some & 0xff), odd = (shorts)((words)some >> 8);
    to->sum += sad(some);
    to->squares += (dwords)madd(even, even) + (dwords)madd(odd, odd);
    to->low = min8(to->low, v | ~kept);
    to->high = max8(to->high, some);
}

PART void add_words(Words *to, shorts v, shorts kept)
{
    shorts some = v & kept;
    qwords squares = (qwords)madd(some, some);      /* of each two: at most 2**31 */
    to->sum += madd(some, (shorts){0} + 1);
    to->squares += (squares & 0xffffffff) + (squares >> 32);
    to->low = min16(to->low, some | (~kept & 32767));
    to->high = max16(to->high, some | (~kept & (int16_t)-32768));
}

PART void flush_extremes(Sums *to, bytes low, bytes high)
{
    for (size_t i = 0; i < RUN_BYTES; i++) {
        to->low = low[i] < to->low ? low[i] : to->low;
        to->high = high[i] > to->high ? high[i] : to->high;
    }
}

PART void flush_bytes(Sums *to, const Bytes *from)
{
    for (size_t i = 0; i < RUN_BYTES / 8; i++)
        to->sum += (int64_t)from->sum[i];
    for (size_t i = 0; i < RUN_BYTES / 4; i++)
        to->squares += from->squares[i];
    flush_extremes(to, from->low, from->high);
}

#if RUN_BYTES == 64
PART void flush_dots(Sums *to, const Dots *from)
{
    int64_t sum = 0, squares = 0;
    for (size_t i = 0; i < RUN_BYTES / 4; i++) {
        sum += from->sum[i];
        squares += from->squares[i];
    }
    to->sum += sum;
    to->squares += (uint64_t)(squares + 128 * sum);
    flush_extremes(to, from->low, from->high);
}
#endif

PART void flush_words(Sums *to, const Words *from)
{
    Sums all = no_sums(16);
    for (size_t i = 0; i < RUN_BYTES / 4; i++)
        all.sum += from->sum[i];
    for (size_t i = 0; i < RUN_BYTES / 8; i++)
        all.squares += from->squares[i];
    for (size_t i = 0; i < RUN_BYTES / 2; i++) {
        all.low = from->low[i] < all.low ? from->low[i] : all.low;
        all.high = from->high[i] > all.high ? from->high[i] : all.high;
    }
    join_sums(to, all);
}

/* ---- runs: of one channel, or of three by turns. n elements; `rest` is what is left of a
 * register, in which `keep` leaves the other lanes out ---- */

#define EACH_THIRD(x) x, 0, 0, x, 0, 0, x, 0, 0, x, 0, 0, x, 0, 0, x, 0, 0
static const uint8_t third8[72] = {EACH_THIRD(255), EACH_THIRD(255), EACH_THIRD(255),
                                   EACH_THIRD(255)};
static const uint16_t third16[36] = {EACH_THIRD(65535), EACH_THIRD(65535)};
/* All bits from the middle on. */
static const uint8_t beyond[2 * RUN_BYTES] = {
    [0 ... RUN_BYTES - 1] = 255, [RUN_BYTES ... 2 * RUN_BYTES - 1] = 0};

/* Of the lanes of the k-th of three registers, those of channel c. */
PART bytes mask8(int k, int c) { return load8(third8 + (k * RUN_BYTES - c + 3) % 3); }
PART shorts mask16(int k, int c) { return load16(third16 + (k * RUN_BYTES / 2 - c + 3) % 3); }

#define PICK(c) ((v[0] & m[0][c]) | (v[1] & m[1][c]) | (v[2] & m[2][c]))
#define PICK_KEPT(c) ((w[0] & m[0][c]) | (w[1] & m[1][c]) | (w[2] & m[2][c]))

#define DEFINE_RUN(name, target, bits, element, lane, vector, accumulator, plural, load_vector) \
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
            add_##plural(&a, load_vector(p + i) ^ flips, kept ? load_vector(keep + i) : all); \
        if (i < end) { \
            vector v = flips, k = {0}; \
            memcpy(&v, p + i, (size_t)(end - i) * sizeof(element)); \
            if (kept) \
                memcpy(&k, keep + i, (size_t)(end - i) * sizeof(element)); \
            else \
                k = (vector)load8(beyond + RUN_BYTES - (end - i) * sizeof(element)); \
            add_##plural(&a, v ^ flips, k); \
            i = end; \
        } \
        flush_##plural(to, &a); \
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
PART target void some_of_thirds##name(const element *p, const element *keep, ptrdiff_t n, \
                                      int flip, Sums *to, int kept) \
{ \
    enum { LANES = sizeof(vector) / sizeof(element) }; \
    const vector flips = (vector){0} + (lane)flip; \
    const vector all = (vector)~(bytes){0}; \
    vector m[3][3]; \
    ptrdiff_t i = 0, end; \
    for (int k = 0; k < 3; k++) \
        for (int c = 0; c < 3; c++) \
            m[k][c] = mask##bits(k, c); \
    while (i < n) { \
        accumulator a[3] = {no_##plural(), no_##plural(), no_##plural()}; \
        end = n - i > BEFORE_OVERFLOW * 3 * (ptrdiff_t)LANES ? i + BEFORE_OVERFLOW * 3 * LANES : n; \
        while (i < end) { \
            vector v[3], w[3] = {all, all, all}; \
            if (i + 3 * LANES <= end) { \
                for (int k = 0; k < 3; k++) { \
                    v[k] = load_vector(p + i + k * LANES) ^ flips; \
                    if (kept) \
                        w[k] = load_vector(keep + i + k * LANES); \
                } \
                i += 3 * LANES; \
                for (int c = 0; c < 3; c++) \
                    add_##plural(&a[c], PICK(c), kept ? PICK_KEPT(c) : all); \
            } else { \
                size_t size = (size_t)(end - i) * sizeof(element); \
                memset(v, 0, sizeof v); \
                memset(w, 0, sizeof w); \
                memcpy(v, p + i, size); \
                if (kept) \
                    memcpy(w, keep + i, size); \
                else \
                    memset(w, 255, size); \
                for (int k = 0; k < 3; k++) \
                    v[k] ^= flips; \
                i = end; \
                for (int c = 0; c < 3; c++) \
                    add_##plural(&a[c], PICK(c), PICK_KEPT(c)); \
            } \
        } \
        for (int c = 0; c < 3; c++) \
            flush_##plural(&to[c], &a[c]); \
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

DEFINE_RUN(16, , 16, uint16_t, int16_t, shorts, Words, words, load16)
DEFINE_RUN(8_by_pairs, , 8, uint8_t, uint8_t, bytes, Bytes, bytes, load8)
#ifdef HAS_DOTS
DEFINE_RUN(8_by_dots, DOTS, 8, uint8_t, uint8_t, bytes, Dots, dots, load8)
#define RUN8(kind) (HAS_DOTS ? kind##8_by_dots : kind##8_by_pairs)
#else
#define RUN8(kind) kind##8_by_pairs
#endif

static void run8(const uint8_t *p, const uint8_t *keep, ptrdiff_t n, int flip, Sums *to)
{ RUN8(run)(p, keep, n, flip, to); }
static void thirds8(const uint8_t *p, const uint8_t *keep, ptrdiff_t n, int flip, Sums *to)
{ RUN8(thirds)(p, keep, n, flip, to); }

/* ---- columns: of rows a step apart, each column by itself ---- */

PART void column_vector8(const uint8_t *p, const uint8_t *keep, ptrdiff_t rows, ptrdiff_t step,
                         int flip, Sums *to, int kept)
{
    const bytes flips = (bytes){0} + (uint8_t)flip, all = ~(bytes){0};
    words sum[2] = {{0}, {0}};
    dwords squares[4] = {{0}, {0}, {0}, {0}};
    bytes low = all, high = {0};
    for (ptrdiff_t r = 0; r < rows; r++) {
        bytes k = kept ? load8(keep + r * step) : all;
        bytes v = (load8(p + r * step) ^ flips), some = v & k;
        words even = (words)some & 0xff, odd = (words)some >> 8;
        dwords even_squares = (dwords)(even * even), odd_squares = (dwords)(odd * odd);
        sum[0] += even;
        sum[1] += odd;
        squares[0] += even_squares & 0xffff;
        squares[1] += odd_squares & 0xffff;
        squares[2] += even_squares >> 16;
        squares[3] += odd_squares >> 16;
        low = min8(low, v | ~k);
        high = max8(high, some);
    }
    for (size_t i = 0; i < RUN_BYTES; i++)
        to[i] = (Sums){sum[i % 2][i / 2], squares[i % 4][i / 4], low[i], high[i]};
}

PART void column_vector16(const uint16_t *p, const uint16_t *keep, ptrdiff_t rows, ptrdiff_t step,
                          int flip, Sums *to, int kept)
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
        low = min16(low, some | (~k & 32767));
        high = max16(high, some | (~k & (int16_t)-32768));
    }
    for (size_t i = 0; i < RUN_BYTES / 2; i++)
        to[i] = (Sums){sum[i % 2][i / 2], squares[i % 4][i / 4], low[i], high[i]};
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
        if (keep != NULL) \
            column_vector##bits(p + at, keep + at, rows, step, flip, to + at, 1); \
        else \
            column_vector##bits(p + at, NULL, rows, step, flip, to + at, 0); \
    } \
}

DEFINE_COLUMNS(8, uint8_t, (int32_t))
DEFINE_COLUMNS(16, uint16_t, (int32_t)(int16_t))


/* ---- masks: a byte for each element or pixel, not 0 where it counts -> `keep` ---- */

#define SPREAD(width) \
    for (ptrdiff_t i = done; i < n; i++) \
        for (int j = 0; j < width; j++) \
            keep[i * width + j] = (uint8_t)-(mask[i] != 0);

typedef uint8_t marks __attribute__((vector_size(16)));

/* Three bytes for each of n marks, of as many as fill registers: how many these are. */
static ptrdiff_t spread_by_three(const uint8_t *restrict mask, ptrdiff_t n, uint8_t *restrict keep)
{
    ptrdiff_t i = 0;
    for (; i + 16 <= n; i += 16) {
        marks m, first, second, third;
        memcpy(&m, mask + i, sizeof m);
        m = (marks)(m != 0);
        first = __builtin_shufflevector(m, m, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5);
        second = __builtin_shufflevector(m, m, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10);
        third = __builtin_shufflevector(m, m, 10, 11, 11, 11, 12, 12, 12, 13, 13, 13, 14, 14, 14,
                                        15, 15, 15);
        memcpy(keep + 3 * i, &first, sizeof first);
        memcpy(keep + 3 * i + 16, &second, sizeof second);
        memcpy(keep + 3 * i + 32, &third, sizeof third);
    }
    return i;
}

/* So many bytes for each of n marks, which are a step apart. */
static void spread_mask(const uint8_t *restrict mask, ptrdiff_t step, ptrdiff_t n, ptrdiff_t width,
                        uint8_t *restrict keep)
{
    ptrdiff_t done = step == 1 && width == 3 ? spread_by_three(mask, n, keep) : 0;
    if (step == 1 && width == 1) {
        SPREAD(1)
    } else if (step == 1 && width == 2) {
        SPREAD(2)
    } else if (step == 1 && width == 3) {
        SPREAD(3)
    } else if (step == 1 && width == 4) {
        SPREAD(4)
    } else {
        for (ptrdiff_t i = 0; i < n; i++)
            memset(keep + i * width, mask[i * step] ? 255 : 0, (size_t)width);
    }
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
