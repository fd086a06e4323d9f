# SPDX-License-Identifier: BSD-3-Clause
"""How many threads a call gets."""

cpdef int threads_for(Py_ssize_t size) except -1
cpdef int team_for(Py_ssize_t size) except -1
cpdef void team_was(double loss, Py_ssize_t size) noexcept
