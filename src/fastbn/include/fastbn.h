/* SPDX-License-Identifier: BSD-3-Clause
 *
 * fastbn for C, C++ and Cython: batch, layer, RMS, group and instance norm, forward
 * and backward, on memory and threads of the caller's. docs/embedding.md explains it;
 * the examples are in examples/embed.
 *
 *     const fastbn_api *fastbn = fastbn_import();      an extension module of Python
 *     const fastbn_api *fastbn = fastbn_get_api();     a program without Python
 *
 * No function allocates, prints, raises or keeps a pointer beyond `finish`. Results have
 * the bits of the Python functions, whatever the number of threads or tasks.
 *
 * Numbers here never change their meaning, and structs only grow at the end.
 */
#ifndef FASTBN_H
#define FASTBN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FASTBN_ABI 1

enum fastbn_norm {
    FASTBN_BATCH_NORM = 1,
    FASTBN_INSTANCE_NORM = 2,
    FASTBN_GROUP_NORM = 3,
    FASTBN_LAYER_NORM = 4,
    FASTBN_RMS_NORM = 5
};

enum fastbn_operation {
    FASTBN_STATISTICS = 1,          /* batch norm only */
    FASTBN_INFERENCE = 2,           /* batch norm only */
    FASTBN_FORWARD = 3,             /* with statistics of x; running ones are updated */
    FASTBN_BACKWARD = 4,
    FASTBN_BACKWARD_INFERENCE = 5,  /* batch norm only: with fixed statistics */
    /* Batch norm only, too: elements of one type and layout become those of another. */
    FASTBN_NORMALIZE = 6,           /* out = (x / max_value - norm_mean) / norm_std */
    FASTBN_DENORMALIZE = 7          /* out = (x * norm_std + norm_mean) * max_value */
};

enum fastbn_dtype {
    FASTBN_FLOAT32 = 1,
    FASTBN_FLOAT64 = 2,
    FASTBN_FLOAT16 = 3,
    FASTBN_BFLOAT16 = 4,
    /* Of statistics and normalize; of what denormalize writes. */
    FASTBN_UINT8 = 5,
    FASTBN_INT8 = 6,
    FASTBN_UINT16 = 7,
    FASTBN_INT16 = 8
};

enum fastbn_activation {            /* y = activation(normalised + residual) */
    FASTBN_IDENTITY = 0,
    FASTBN_RELU = 1,
    FASTBN_LEAKY_RELU = 2,
    FASTBN_SILU = 3,
    FASTBN_RELU6 = 4,
    FASTBN_HARDSWISH = 5,
    FASTBN_HARDSIGMOID = 6
};

enum fastbn_error {
    FASTBN_OK = 0,
    FASTBN_UNKNOWN_FIELD = 1,
    FASTBN_NULL_POINTER = 2,
    FASTBN_BAD_OPERATION = 3,
    FASTBN_BAD_DTYPE = 4,
    FASTBN_BAD_SHAPE = 5,
    FASTBN_BAD_AXIS = 6,
    FASTBN_BAD_GROUPS = 7,
    FASTBN_BAD_NUMBER = 8,
    FASTBN_ONE_VALUE = 9,
    FASTBN_BAD_STRIDES = 10,
    FASTBN_MISALIGNED = 11,
    FASTBN_BAD_WORKERS = 12,
    FASTBN_BAD_WORKSPACE = 13,
    FASTBN_BAD_TASK = 14,
    FASTBN_OVERLAP = 15,
    FASTBN_BAD_MASK = 16
};

/* Elements of `dtype`, in the shape of the call. Strides are in elements, one for each
 * axis, and may be negative, or 0 in what is only read; NULL: without gaps, the last axis
 * the fastest. */
typedef struct fastbn_tensor {
    void *data;
    const ptrdiff_t *strides;
} fastbn_tensor;

/* What is to be done. Set all to 0, then what the operation needs; what it does not need
 * is ignored. */
typedef struct fastbn_call {
    size_t struct_size;         /* sizeof(fastbn_call) */
    int32_t norm;               /* FASTBN_BATCH_NORM, ... */
    int32_t operation;          /* FASTBN_FORWARD, ... */
    int32_t dtype;              /* of tensors: FASTBN_FLOAT32, ... */
    int32_t vector_dtype;       /* of weight, bias, their gradients and running statistics,
                                   which are not half; needed only with them */
    int32_t ndim;               /* at most 64 */
    int32_t channel_axis;       /* 1 for NCHW, 3 for NHWC; not of layer and RMS norm */
    int32_t sample_axis;        /* of group and instance norm, and of lengths */
    int32_t normalized_ndim;    /* of layer and RMS norm: the last axes, so many */
    const ptrdiff_t *shape;     /* ndim sizes, at least 1 */
    ptrdiff_t groups;           /* of group norm */
    double eps;                 /* at least 0; more with the statistics of a batch */
    double momentum;            /* weight of the new in running statistics */
    fastbn_tensor x;
    fastbn_tensor dy;           /* backward */
    fastbn_tensor out;          /* y or dx; each other tensor is the same or apart from it */
    /* One number for each channel (layer and RMS norm: for each element of the normalised
     * axes, in C order). */
    const void *weight;         /* NULL: 1 */
    const void *bias;           /* NULL: 0 */
    void *running_mean;         /* read in inference; updated by `finish` of forward; */
    void *running_var;          /* NULL in forward: not kept */
    void *dweight;              /* written by `finish` of backward; NULL: not wanted */
    void *dbias;
    /* Statistics, float64: of each channel; (samples, channels) of instance norm, (samples,
     * groups) of group norm; of layer and RMS norm, of each position of the other axes.
     * Written in statistics (mean, m2), inference and forward (mean, invstd; NULL: not
     * wanted), read in backward. RMS norm has no mean. */
    double *mean;
    double *invstd;             /* 1 / sqrt(variance + eps) */
    double *m2;                 /* sum of squared deviations */
    /* What follows the normalisation, in the same pass. Backward takes the same, with the
     * bias of forward. */
    int32_t activation;         /* FASTBN_RELU, ... */
    int32_t reserved;           /* 0 */
    double negative_slope;      /* of FASTBN_LEAKY_RELU, without a default: 0 is one */
    fastbn_tensor residual;     /* data NULL: there is none */
    fastbn_tensor dresidual;    /* backward with a residual: its gradient is written; may be
                                   dy or residual, and is apart from x and out */
    /* Normalize writes a float type, denormalize reads one. The strides of `out` are in the
     * order of `shape`, in whatever order its axes lie in memory; `out` is apart from x. */
    int32_t out_dtype;          /* of `out`: FASTBN_FLOAT32, ...; others have `dtype` */
    int32_t reserved2;          /* 0 */
    double max_value;           /* more than 0 */
    const double *norm_mean;    /* of each channel; */
    const double *norm_std;     /* more than 0 */
    /* Statistics: of each channel, of `dtype`; NULL: not wanted. NaN, of floats, if the
     * channel has one. */
    void *minimum;
    void *maximum;
    /* Which elements count, of all channels alike: a mask, or lengths; not of layer and RMS
     * norm. The others enter no statistics and no gradient; out and dresidual are 0 there. */
    fastbn_tensor mask;         /* bytes, 0 or 1; it has strides, that of the channel axis 0;
                                   data NULL: all count */
    const int64_t *lengths;     /* of each sample, how many along length_axis count: the
                                   first; from 0 to its size. NULL: all */
    int32_t length_axis;
    int32_t padding;            /* 0 */
} fastbn_call;

/* Functions return FASTBN_OK or another of the codes above, if not said otherwise.
 *
 * A call is either `run`; or `begin`, then the phases one after the other, the tasks
 * [0, tasks) of each on any threads in any order, then `finish`. Workers are the threads
 * that run tasks of one call at the same time: each uses a number of its own. */
typedef struct fastbn_api {
    size_t struct_size;
    int32_t abi;                /* FASTBN_ABI of the library */
    const char *version;        /* of the library, such as "0.1.0" */
    const char *(*error_message)(int code);
    /* How much memory `begin` and `run` need, in bytes. Reads no tensor and no vector, but
     * looks at all of `call`: what is wrong with it is said here. */
    int (*workspace_size)(const fastbn_call *call, int workers, size_t *size);
    /* On as many threads of OpenMP, if the library has it; else one after the other. */
    int (*run)(const fastbn_call *call, int threads, void *workspace, size_t size);
    int (*begin)(const fastbn_call *call, int workers, void *workspace, size_t size);
    int (*phases)(const void *workspace);                       /* returns their number */
    ptrdiff_t (*tasks)(const void *workspace, int phase);       /* returns their number */
    int (*run_tasks)(const void *workspace, int phase, ptrdiff_t begin, ptrdiff_t end,
                     int worker);
    int (*finish)(void *workspace);
} fastbn_api;

/* Does the library have all that this header promises? */
static inline int fastbn_is_compatible(const fastbn_api *api)
{
    return api->abi == FASTBN_ABI && api->struct_size >= sizeof(fastbn_api);
}

/* The library without Python has this one function. NULL: the CPU is too old. */
const fastbn_api *fastbn_get_api(void);

/* For extension modules, which include Python.h first: NULL with an exception set. */
#ifdef Py_PYTHON_H
static inline const fastbn_api *fastbn_import(void)
{
    const fastbn_api *api = (const fastbn_api *)PyCapsule_Import("fastbn._C_API", 0);
    if (api != NULL && !fastbn_is_compatible(api)) {
        PyErr_Format(PyExc_ImportError, "built for another fastbn than %s, which is installed",
                     api->version);
        return NULL;
    }
    return api;
}
#endif

#ifdef __cplusplus
}
#endif

#endif
