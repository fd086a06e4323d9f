# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3
"""A Cython module: RMS norm of rows of float32, without NumPy."""
from fastbn cimport *
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cdef const fastbn_api* fastbn = fastbn_import()


def rms_norm(const float[:, ::1] x, const float[::1] weight, float[:, ::1] out, double eps=1e-5):
    cdef fastbn_call call
    cdef size_t size
    if x.shape[0] != out.shape[0] or x.shape[1] != out.shape[1] or x.shape[1] != weight.shape[0]:
        raise ValueError("x, weight, out: expected as many rows and columns as each other")
    if x.shape[0] == 0 or x.shape[1] == 0:
        return
    memset(&call, 0, sizeof(call))
    call.struct_size, call.norm, call.operation = sizeof(call), FASTBN_RMS_NORM, FASTBN_FORWARD
    call.dtype = call.vector_dtype = FASTBN_FLOAT32
    call.ndim, call.normalized_ndim, call.shape, call.eps = 2, 1, x.shape, eps
    call.weight = &weight[0]
    call.x.data, call.out.data = <void*>&x[0, 0], &out[0, 0]
    cdef int code = fastbn.workspace_size(&call, 1, &size)
    cdef void* workspace = malloc(size) if code == 0 else NULL
    if code == 0:
        with nogil:
            code = fastbn.run(&call, 1, workspace, size)
    free(workspace)
    if code != 0:
        raise ValueError(fastbn.error_message(code).decode())
