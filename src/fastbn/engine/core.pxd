# SPDX-License-Identifier: BSD-3-Clause
"""The engine, as bindings see it: a call of fastbn.h, and what only bindings may add to it.

    understand(&call, &extras, &request)    checks the call; a code and the argument at fault
    work_of(&request)                       bytes, for a choice of threads
    run(&request, workers)                  computes, in memory of its own
    commit(&request)                        writes what is kept over calls: running statistics,
                                            gradients of parameters
    release(&request)                       always, after `run` or `run_own`

Where x is a part of a batch (`extras.part`), `run` is done in two steps. What the others have
is merged between them, by the binding; `commit` comes after the first of them in backward,
whose gradients of parameters are those of the part, and after the second in forward.

    run_own(&request, workers, &count, vectors)
            values of a channel; (2, C) vectors: (mean, M2), or (sum dy, sum dy * xhat)
    run_rest(&request, count, vectors)      with those of the whole batch

Declarations only.
"""
from fastbn cimport fastbn_call
from fastbn.engine.request cimport Axes, Extras, Memory, Request
from fastbn.kernels.problem cimport KernelTable

cdef int understand(const fastbn_call* given, const Extras* extras, Request* r) noexcept nogil
cdef Py_ssize_t work_of(const Request* r) noexcept nogil
cdef int run(Request* r, int workers) noexcept nogil
cdef int run_own(Request* r, int workers, double* count, double* vectors) noexcept nogil
cdef int run_rest(Request* r, double count, const double* vectors) noexcept nogil
cdef void commit(Request* r) noexcept nogil
cdef void release(Request* r) noexcept nogil

# Rules that bindings need, too.
cdef bint is_finite(double number) noexcept nogil
cdef bint is_eps(double eps, bint positive) noexcept nogil
cdef bint needs_positive_eps(const fastbn_call* call) noexcept nogil
cdef bint can_be_grouped(Py_ssize_t channels, Py_ssize_t groups) noexcept nogil
cdef bint overlap(const Memory* a, const Memory* b) noexcept nogil
cdef double default_rms_eps(int dtype) noexcept nogil

# What inference needs of statistics and parameters, for any shape with these channels.
cdef size_t size_of_coefficients(Py_ssize_t channels) noexcept nogil
cdef int prepare_coefficients(const fastbn_call* call, void* coefficients) noexcept nogil
cdef const KernelTable* kernels_for(int dtype) noexcept nogil

# The axes [first, end) longer than 1, slowest first, but `skipped`; returns their number.
cdef int memory_order(const Axes* x, int first, int end, int skipped, int* order) noexcept nogil
