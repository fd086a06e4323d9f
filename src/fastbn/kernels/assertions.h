/* SPDX-License-Identifier: BSD-3-Clause
 *
 * What the compiler checks of numbers that must agree. Nothing else. */
#ifndef FASTBN_ASSERTIONS_H
#define FASTBN_ASSERTIONS_H

/* Fails to compile where it does not hold. */
#define assert_constant(condition) _Static_assert(condition, #condition)

#endif
