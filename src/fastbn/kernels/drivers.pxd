# SPDX-License-Identifier: BSD-3-Clause
"""The operations, as the view calls them, and as fastbn.torch does: a call of fastbn.h."""
from fastbn cimport fastbn_call
from fastbn.kernels.job cimport Job, KernelTable

cdef int statistics(const KernelTable* kernels, Job* job) noexcept nogil
cdef int preparation(const KernelTable* kernels, Job* job) noexcept nogil
cdef int inference(const KernelTable* kernels, Job* job) noexcept nogil
cdef int training(const KernelTable* kernels, Job* job) noexcept nogil
cdef int gradients(const KernelTable* kernels, Job* job) noexcept nogil
cdef int run_call(const fastbn_call* call, int threads, int (*stopped)() noexcept nogil,
                  double* loss) noexcept nogil
