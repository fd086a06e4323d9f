# SPDX-License-Identifier: BSD-3-Clause
# The arithmetic of every write, on one register of elements:
#
#   forward         y = activation((x * pow2_scale - pivot) * scale + shift + residual)
#   gradient        dx = (dz * scale - ((x * pow2_scale - pivot) * slope + shift)) * pow2_scale
#
# where dz is dy, taken back through the activation, and `pow2_scale` is 1 for all usual data,
# and then left out: to multiply by 1 is exact.
#
# May: compute, on one register. May not: walk through a tensor.

cdef inline lanes center(const Coefficients* coef, lanes x, int variant) noexcept nogil:
    return (x * coef.pow2_scale if variant & POW2_SCALED else x) - coef.pivot


cdef inline lanes finish(const Activation* a, lanes z, const Vectors* vectors,
                         int variant) noexcept nogil:
    # What is written for a normalised z.
    if is_plain(variant):
        return z
    if a.adds:
        z = z + vectors.residual
    return activation_grad(a, z, vectors.dy) if variant & DZ else activate(a, z)


cdef inline lanes backward(const Coefficients* coef, lanes d, lanes dz, int variant) noexcept nogil:
    cdef lanes dx = dz * coef.scale - (d * coef.slope + coef.shift)
    return dx * coef.pow2_scale if variant & POW2_SCALED else dx


cdef inline lanes fused_backward(const Coefficients* coef, const Activation* a,
                                 const Vectors* vectors, int variant) noexcept nogil:
    cdef lanes x = leaky_inverse(a, vectors.x) if a.inverted else vectors.x
    cdef lanes d = center(coef, x, variant)
    cdef lanes z = vectors.x if a.inverted else d * coef.scale + coef.offset
    cdef lanes dz = activation_grad_outlined(a, z, vectors.dy)
    if not a.frozen:
        return backward(coef, d, dz, variant)
    return dz * coef.scale * coef.pow2_scale if variant & POW2_SCALED else dz * coef.scale


cdef inline lanes value(const Coefficients* coef, const Activation* a, const Vectors* vectors,
                        int variant) noexcept nogil:
    if variant & GRADIENT and variant & FUSED:
        return fused_backward(coef, a, vectors, variant)
    if variant & GRADIENT:
        return backward(coef, center(coef, vectors.x, variant), vectors.dy, variant)
    return finish(a, center(coef, vectors.x, variant) * coef.scale + coef.shift, vectors,
                  variant)


cdef inline lanes value_at(const Coefficients* coef, const Pointers* p, Py_ssize_t i,
                           int variant) noexcept nogil:
    cdef Vectors vectors = load_vectors(p, i, variant)
    return value(coef, p.activation, &vectors, variant)


cdef inline void write_n(const Pointers* p, Py_ssize_t i, Py_ssize_t n, const Coefficients* coef,
                         int variant) noexcept nogil:
    cdef Vectors vectors = load_n_vectors(p, i, n, variant)
    store_n(p.out + i, kept(p, i, value(coef, p.activation, &vectors, variant)), n)


cdef inline void write_vector(const Pointers* p, Py_ssize_t i, const Coefficients* coef,
                              int variant) noexcept nogil:
    store_vector(p, i, value_at(coef, p, i, variant), variant)
