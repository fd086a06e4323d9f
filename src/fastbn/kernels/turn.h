/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Matrices with rows and columns exchanged, in squares of registers of 16 bytes.
 *
 * May: move elements. May not: compute with them.
 */
#ifndef FASTBN_TURN_H
#define FASTBN_TURN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LOW8(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, \
                                           7, 23)
#define HIGH8(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, \
                                            14, 30, 15, 31)
#define LOW16(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH16(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW32(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH32(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define LOW64(a, b) __builtin_shufflevector(a, b, 0, 2)
#define HIGH64(a, b) __builtin_shufflevector(a, b, 1, 3)

/* to[r * columns + c] = x[c * column + r].
 *
 * A square is read as SIDE registers, each along a column of `to`, and interleaved with that
 * half the square away until they lie along rows. Squares overlap at the ends. Fewer rows than
 * SIDE are read with what lies behind them, which is of the next column; so not of the last. */
#define DEFINE_TURN(bits, SIDE) \
typedef uint##bits##_t square##bits __attribute__((vector_size(16))); \
static inline __attribute__((always_inline)) void turn_square##bits( \
    const uint##bits##_t *x, ptrdiff_t column, uint##bits##_t *to, ptrdiff_t columns, \
    ptrdiff_t rows) \
{ \
    square##bits v[SIDE], w[SIDE]; \
    for (int i = 0; i < SIDE; i++) \
        memcpy(&v[i], x + i * column, sizeof v[i]); \
    for (int size = SIDE; size > 1; size /= 2) { \
        for (int i = 0; i < SIDE / 2; i++) { \
            w[2 * i] = LOW##bits(v[i], v[i + SIDE / 2]); \
            w[2 * i + 1] = HIGH##bits(v[i], v[i + SIDE / 2]); \
        } \
        memcpy(v, w, sizeof v); \
    } \
    for (int i = 0; i < SIDE; i++) \
        if (i < rows) \
            memcpy(to + i * columns, &v[i], sizeof v[i]); \
} \
static void turn##bits(const uint##bits##_t *x, ptrdiff_t rows, ptrdiff_t columns, \
                       ptrdiff_t column, uint##bits##_t *to) \
{ \
    ptrdiff_t c = 0, r, from; \
    if (rows >= SIDE && columns >= SIDE) { \
        for (r = 0; r < rows; r += SIDE) { \
            from = r + SIDE <= rows ? r : rows - SIDE; \
            for (c = 0; c < columns; c += SIDE) { \
                ptrdiff_t at = c + SIDE <= columns ? c : columns - SIDE; \
                turn_square##bits(x + at * column + from, column, to + from * columns + at, \
                                  columns, SIDE); \
            } \
        } \
        return; \
    } \
    if (rows > SIDE / 2 && column >= rows) \
        for (; c + SIDE < columns; c += SIDE) \
            turn_square##bits(x + c * column, column, to + c, columns, rows); \
    for (; c < columns; c++) \
        for (r = 0; r < rows; r++) \
            to[r * columns + c] = x[c * column + r]; \
}
DEFINE_TURN(8, 16)
DEFINE_TURN(16, 8)
DEFINE_TURN(32, 4)
DEFINE_TURN(64, 2)

#endif
