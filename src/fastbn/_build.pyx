# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3
"""How this copy was built, and which of its levels the CPU has. Queries only.

The macros come from setup.py. Built for the lowest level, since it decides
whether a higher one may be loaded.
"""

cdef extern from *:
    """
    #if defined(__x86_64__)
    static int cpu_level(void)
    {
        /* Asks for every feature of a level, and for the system's consent. */
        __builtin_cpu_init();
        if (__builtin_cpu_supports("x86-64-v4")) return 4;
        if (__builtin_cpu_supports("x86-64-v3")) return 3;
        if (__builtin_cpu_supports("x86-64-v2")) return 2;
        return 1;
    }
    #else
    static int cpu_level(void) { return 0; }
    #endif

    #if defined(__clang__)
    #define COMPILER "clang " __clang_version__
    #else
    #define COMPILER "gcc " __VERSION__
    #endif
    """
    int cpu_level()
    const char* COMPILER
    const char* FASTBN_VERSION
    const char* FASTBN_LEVELS
    const char* FASTBN_FLAGS

VERSION = FASTBN_VERSION.decode()
LEVELS = tuple(FASTBN_LEVELS.decode().split(","))
FLAGS = FASTBN_FLAGS.decode()


def level():
    """Return the highest x86-64 level that can run here; 0 on other machines."""
    return cpu_level()


def compiler():
    """Return the name and version of the compiler that built the package."""
    return COMPILER.decode()
