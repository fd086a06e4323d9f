# SPDX-License-Identifier: BSD-3-Clause
"""How many threads a call gets."""

cdef int threads_for(Py_ssize_t elements) except -1
