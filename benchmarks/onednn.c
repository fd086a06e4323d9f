/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Batch normalization by oneDNN, prepared once and executed many times, so that a
 * benchmark times the library and not Python. For float32: oneDNN has no float64 one.
 *
 *     cc -O2 -shared -fPIC onednn.c -o onednn.so DIR/libdnnl.so.3 -Wl,-rpath,DIR
 *
 * It may not copy or reorder a tensor, as that would change what is timed, and it may
 * not set the number of threads, which is OpenMP's: oneDNN reads it in bn_prepare, so
 * that is when it must be right. The package fastbn may not depend on this file.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* oneDNN's package on PyPI has no headers, hence the part of its C API used here. The
   numbers hold for every oneDNN 3. In oneDNN 2 some are others: only link libdnnl.so.3. */
enum { dnnl_cpu = 1, dnnl_stream_in_order = 1, dnnl_f32 = 3, dnnl_query_impl_info_str = 8 };
enum { dnnl_forward_training = 64, dnnl_forward_inference = 96, dnnl_backward = 128 };
enum { dnnl_use_global_stats = 1, dnnl_use_scale = 2, dnnl_use_shift = 4 };
enum {
    DNNL_ARG_SRC = 1, DNNL_ARG_DST = 17, DNNL_ARG_MEAN = 49, DNNL_ARG_VARIANCE = 50,
    DNNL_ARG_SCALE = 51, DNNL_ARG_SHIFT = 52, DNNL_ARG_DIFF_SRC = 129,
    DNNL_ARG_DIFF_DST = 145, DNNL_ARG_DIFF_SCALE = 255, DNNL_ARG_DIFF_SHIFT = 256
};

typedef struct dnnl_engine *engine_t;
typedef struct dnnl_stream *stream_t;
typedef struct dnnl_memory *memory_t;
typedef struct dnnl_memory_desc *layout_t;
typedef struct dnnl_primitive *primitive_t;
typedef struct dnnl_primitive_desc *choice_t;
typedef struct { int index; memory_t memory; } argument_t;

int dnnl_engine_create(engine_t *, int kind, size_t index);
int dnnl_engine_destroy(engine_t);
int dnnl_stream_create(stream_t *, engine_t, unsigned flags);
int dnnl_stream_wait(stream_t);
int dnnl_stream_destroy(stream_t);
int dnnl_memory_desc_create_with_strides(layout_t *, int rank, const int64_t *dims, int type,
                                         const int64_t *strides);
int dnnl_memory_desc_destroy(layout_t);
int dnnl_memory_create(memory_t *, layout_t, engine_t, void *data);
int dnnl_memory_destroy(memory_t);
int dnnl_batch_normalization_forward_primitive_desc_create(
    choice_t *, engine_t, int kind, layout_t x, layout_t y, float eps, unsigned flags,
    const void *attributes);
int dnnl_batch_normalization_backward_primitive_desc_create(
    choice_t *, engine_t, int kind, layout_t dx, layout_t dy, layout_t x, float eps,
    unsigned flags, choice_t forward, const void *attributes);
int dnnl_primitive_desc_query(choice_t, int what, int index, void *result);
int dnnl_primitive_desc_destroy(choice_t);
int dnnl_primitive_create(primitive_t *, choice_t);
int dnnl_primitive_execute(primitive_t, stream_t, int count, const argument_t *);
int dnnl_primitive_destroy(primitive_t);

enum { INFERENCE, TRAINING, BACKWARD };
enum { MAX_RANK = 5, MAX_ARGUMENTS = 8 };

struct batch_norm {
    engine_t engine;
    stream_t stream;
    layout_t tensor, channels;
    choice_t forward, backward; /* oneDNN wants the first even to create the second */
    primitive_t primitive;
    int count;
    argument_t arguments[MAX_ARGUMENTS];
};

/* Strides, because format tags would need one name for each rank and order. oneDNN
   recognizes the orders it has fast kernels for from the strides as well. */
static int describe(struct batch_norm *bn, int channels_last, int rank, const int64_t *dims)
{
    int64_t strides[MAX_RANK], one = 1, step = channels_last ? dims[1] : 1;

    for (int i = rank - 1; i > 1; i--) {
        strides[i] = step;
        step *= dims[i];
    }
    strides[1] = channels_last ? 1 : step;
    strides[0] = channels_last ? step : step * dims[1];
    return dnnl_memory_desc_create_with_strides(&bn->tensor, rank, dims, dnnl_f32, strides) ||
           dnnl_memory_desc_create_with_strides(&bn->channels, 1, dims + 1, dnnl_f32, &one);
}

static choice_t chosen(const struct batch_norm *bn)
{
    return bn->backward ? bn->backward : bn->forward;
}

static int choose(struct batch_norm *bn, int op, float eps)
{
    int kind = op == INFERENCE ? dnnl_forward_inference : dnnl_forward_training;
    unsigned flags = dnnl_use_scale | dnnl_use_shift;

    if (op == INFERENCE)
        flags |= dnnl_use_global_stats;
    return dnnl_batch_normalization_forward_primitive_desc_create(
               &bn->forward, bn->engine, kind, bn->tensor, bn->tensor, eps, flags, NULL) ||
           (op == BACKWARD &&
            dnnl_batch_normalization_backward_primitive_desc_create(
                &bn->backward, bn->engine, dnnl_backward, bn->tensor, bn->tensor, bn->tensor,
                eps, flags, bn->forward, NULL)) ||
           dnnl_primitive_create(&bn->primitive, chosen(bn));
}

/* oneDNN accepts memory without data and fails only later, so NULL is refused here. */
static int attach(struct batch_norm *bn, int index, layout_t layout, float *data)
{
    argument_t *argument = &bn->arguments[bn->count];

    if (!data || dnnl_memory_create(&argument->memory, layout, bn->engine, data))
        return 1;
    argument->index = index;
    bn->count++;
    return 0;
}

void bn_free(void *prepared)
{
    struct batch_norm *bn = prepared;

    if (!bn)
        return;
    while (bn->count > 0)
        dnnl_memory_destroy(bn->arguments[--bn->count].memory);
    dnnl_primitive_destroy(bn->primitive);
    dnnl_primitive_desc_destroy(bn->backward);
    dnnl_primitive_desc_destroy(bn->forward);
    dnnl_memory_desc_destroy(bn->channels);
    dnnl_memory_desc_destroy(bn->tensor);
    dnnl_stream_destroy(bn->stream);
    dnnl_engine_destroy(bn->engine);
    free(bn);
}

/* op: 0 inference with the given mean and variance, 1 training forward, which writes
   them, 2 backward of training. dims: N, C, then the spatial sizes; in memory x, dy and
   out are N, spatial sizes, C if channels_last. The variance is the biased one. Data an
   op does not use may be NULL, the rest must outlive the result. NULL on failure. */
void *bn_prepare(int op, int channels_last, int rank, const int64_t *dims, float eps,
                 float *x, float *dy, float *out, float *mean, float *variance,
                 float *weight, float *bias, float *dweight, float *dbias)
{
    int known = op >= INFERENCE && op <= BACKWARD && rank >= 2 && rank <= MAX_RANK;
    struct batch_norm *bn = known ? calloc(1, sizeof *bn) : NULL;
    int failed = !bn || dnnl_engine_create(&bn->engine, dnnl_cpu, 0) ||
                 dnnl_stream_create(&bn->stream, bn->engine, dnnl_stream_in_order) ||
                 describe(bn, channels_last, rank, dims) || choose(bn, op, eps) ||
                 attach(bn, DNNL_ARG_SRC, bn->tensor, x) ||
                 attach(bn, DNNL_ARG_MEAN, bn->channels, mean) ||
                 attach(bn, DNNL_ARG_VARIANCE, bn->channels, variance) ||
                 attach(bn, DNNL_ARG_SCALE, bn->channels, weight);

    if (op == BACKWARD)
        failed = failed || attach(bn, DNNL_ARG_DIFF_DST, bn->tensor, dy) ||
                 attach(bn, DNNL_ARG_DIFF_SRC, bn->tensor, out) ||
                 attach(bn, DNNL_ARG_DIFF_SCALE, bn->channels, dweight) ||
                 attach(bn, DNNL_ARG_DIFF_SHIFT, bn->channels, dbias);
    else
        failed = failed || attach(bn, DNNL_ARG_SHIFT, bn->channels, bias) ||
                 attach(bn, DNNL_ARG_DST, bn->tensor, out);
    if (!failed)
        return bn;
    bn_free(bn);
    return NULL;
}

/* Waits after each execution, as a caller that needs the result would. Returns 0 or
   oneDNN's status. */
int bn_run(void *prepared, int count)
{
    struct batch_norm *bn = prepared;
    int status = 0;

    while (!status && count-- > 0) {
        status = dnnl_primitive_execute(bn->primitive, bn->stream, bn->count, bn->arguments);
        if (!status)
            status = dnnl_stream_wait(bn->stream);
    }
    return status;
}

/* oneDNN's own name of the implementation it picked, which tells jit kernels from plain
   loops. Valid until bn_free, NULL on failure. */
const char *bn_implementation(void *prepared)
{
    const char *name = NULL;

    if (dnnl_primitive_desc_query(chosen(prepared), dnnl_query_impl_info_str, 0, &name))
        return NULL;
    return name;
}
