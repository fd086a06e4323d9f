/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Sums of integers that threads found, in 128 bits, to mean and M2, each rounded once: what
 * Python's integers give. May not touch a tensor.
 */
#ifndef FASTBN_TOTALS_H
#define FASTBN_TOTALS_H

#include "runs.h"

typedef __int128 wide;
typedef unsigned __int128 unsigned_wide;

/* Of one channel, in the range that sums have. Of a thread, and then of all. */
typedef struct {
    int64_t sum;
    uint64_t squares, more_squares;     /* the upper 64 bits */
    int64_t count;
    int32_t low, high;
} Total;

static inline Total no_total(int bits)
{
    Sums none = no_sums(bits);
    return (Total){0, 0, 0, 0, none.low, none.high};
}

static inline void add_squares(Total *to, uint64_t squares, uint64_t more)
{
    to->squares += squares;
    to->more_squares += more + (to->squares < squares);
}

static inline void add_to_total(Total *to, const Sums *sums)
{
    to->sum += sums->sum;
    add_squares(to, sums->squares, 0);
    to->low = sums->low < to->low ? sums->low : to->low;
    to->high = sums->high > to->high ? sums->high : to->high;
}

static inline void join_totals(Total *to, const Total *more)
{
    to->sum += more->sum;
    add_squares(to, more->squares, more->more_squares);
    to->count += more->count;
    to->low = more->low < to->low ? more->low : to->low;
    to->high = more->high > to->high ? more->high : to->high;
}

static inline int bits_of(unsigned_wide x)
{
    uint64_t upper = (uint64_t)(x >> 64);
    return upper ? 128 - __builtin_clzll(upper) : x ? 64 - __builtin_clzll((uint64_t)x) : 0;
}

/* whole + part / n for part < n, rounded once. What is found of it ends with a bit that says
 * whether there is more. */
static double rounded(unsigned_wide whole, uint64_t part, uint64_t n)
{
    unsigned_wide digits = whole;
    uint64_t more = part != 0, bits;
    int shift, exponent = 0;
    double power;
    if (whole == 0 && part == 0)
        return 0;
    if (whole >> 62 == 0) {
        shift = whole ? 64 : 64 + __builtin_clzll(part);
        digits = whole << 64;
        if (shift > 64)
            part <<= shift - 64;
        digits += ((unsigned_wide)part << 64) / n;
        more = ((unsigned_wide)part << 64) % n != 0;
        exponent = -shift;
    }
    shift = bits_of(digits) - 55;
    if (shift > 0) {
        more |= (digits & (((unsigned_wide)1 << shift) - 1)) != 0;
        digits >>= shift;
        exponent += shift;
    }
    bits = (uint64_t)(1023 + exponent) << 52;
    memcpy(&power, &bits, sizeof power);
    return (double)(int64_t)((uint64_t)digits | more) * power;
}

typedef struct {
    double mean, m2;
    int64_t count;
    int32_t low, high;
    int64_t sum, more_sum;              /* of 128 bits each: the lower, the upper ones */
    uint64_t squares, more_squares;
} Result;

/* Of numbers x = t + offset, of which the total is that of each t, found in one of so many
 * `repeats` of the elements. */
static Result result_of(const Total *total, int32_t offset, int64_t repeats)
{
    Result r;
    wide t = (wide)total->sum, n = (wide)total->count * repeats, sum, squares, mean, rest;
    unsigned_wide whole, rest_squares;
    uint64_t count = (uint64_t)n, part;
    squares = (wide)((unsigned_wide)total->more_squares << 64 | total->squares);
    squares = (squares + 2 * (wide)offset * t + (wide)offset * offset * total->count) * repeats;
    sum = (t + (wide)offset * total->count) * repeats;
    r = (Result){0, 0, (int64_t)n, total->low + offset, total->high + offset,
                 (int64_t)(uint64_t)sum, (int64_t)(sum >> 64), (uint64_t)squares,
                 (uint64_t)((unsigned_wide)squares >> 64)};
    if (n == 0)
        return r;
    whole = (unsigned_wide)(sum < 0 ? -sum : sum);
    r.mean = rounded(whole / count, (uint64_t)(whole % count), count);
    if (sum < 0)
        r.mean = -r.mean;
    /* With sum = mean * n + rest: squares - mean * (sum + rest) - rest**2 / n. */
    mean = sum / n;
    rest = sum % n;
    if (rest < 0) {
        mean -= 1;
        rest += n;
    }
    rest_squares = (unsigned_wide)rest * (unsigned_wide)rest;
    whole = (unsigned_wide)(squares - mean * (sum + rest)) - rest_squares / count;
    part = (uint64_t)(rest_squares % count);
    if (part) {
        whole -= 1;
        part = count - part;
    }
    r.m2 = rounded(whole, part, count);
    return r;
}

#endif
