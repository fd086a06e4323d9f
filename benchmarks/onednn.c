/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Normalization by oneDNN, prepared once and executed many times, so that a benchmark
 * times the library and not Python. For float32 and what oneDNN has of 16 bits; it has no
 * float64 one.
 *
 *     cc -O2 -shared -fPIC onednn.c -o onednn.so DIR/libdnnl.so.3 -Wl,-rpath,DIR
 *
 * It may not copy or reorder a tensor, as that would change what is timed, and it may
 * not set the number of threads, which is OpenMP's: oneDNN reads it in norm_prepare, so
 * that is when it must be right. The package fastbn may not depend on this file.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* oneDNN's package on PyPI has no headers, hence the part of its C API used here. The
   numbers hold for every oneDNN 3. In oneDNN 2 some are others: only link libdnnl.so.3.
   Of a flag that it is too old for it says so. */
enum { dnnl_cpu = 1, dnnl_stream_in_order = 1, dnnl_query_impl_info_str = 8 };
enum { dnnl_forward_training = 64, dnnl_forward_inference = 96, dnnl_backward = 128 };
enum {
    dnnl_use_global_stats = 1, dnnl_use_scale = 2, dnnl_use_shift = 4, dnnl_rms_norm = 32
};
enum { dnnl_f32 = 3 };
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
int dnnl_layer_normalization_forward_primitive_desc_create(
    choice_t *, engine_t, int kind, layout_t x, layout_t y, layout_t statistics, float eps,
    unsigned flags, const void *attributes);
int dnnl_layer_normalization_backward_primitive_desc_create(
    choice_t *, engine_t, int kind, layout_t dx, layout_t dy, layout_t x, layout_t statistics,
    float eps, unsigned flags, choice_t forward, const void *attributes);
/* Since oneDNN 3.3; NULL in an older one. */
__attribute__((weak)) int dnnl_group_normalization_forward_primitive_desc_create(
    choice_t *, engine_t, int kind, layout_t x, layout_t y, int64_t groups, float eps,
    unsigned flags, const void *attributes);
__attribute__((weak)) int dnnl_group_normalization_backward_primitive_desc_create(
    choice_t *, engine_t, int kind, layout_t dx, layout_t dy, layout_t x, int64_t groups,
    float eps, unsigned flags, choice_t forward, const void *attributes);
int dnnl_primitive_desc_query(choice_t, int what, int index, void *result);
int dnnl_primitive_desc_destroy(choice_t);
int dnnl_primitive_create(primitive_t *, choice_t);
int dnnl_primitive_execute(primitive_t, stream_t, int count, const argument_t *);
int dnnl_primitive_destroy(primitive_t);

enum { BATCH, LAYER, RMS, GROUP };
enum { INFERENCE, TRAINING, FORWARD, BACKWARD };
enum { MAX_RANK = 5, MAX_ARGUMENTS = 9 };

struct norm {
    int norm, op;
    int64_t groups; /* of GROUP */
    float eps;
    engine_t engine;
    stream_t stream;
    layout_t tensor, channels, statistics;
    choice_t forward, backward; /* oneDNN wants the first even to create the second */
    primitive_t primitive;
    int count;
    argument_t arguments[MAX_ARGUMENTS];
};

/* Strides, because format tags would need one name for each rank and order. oneDNN
   recognizes the orders it has fast kernels for from the strides as well. */
static int describe(struct norm *n, int type, int channels_last, int rank, const int64_t *dims)
{
    int64_t strides[MAX_RANK], one = 1, step = channels_last ? dims[1] : 1;
    const int64_t of_group[] = {dims[0], n->groups}, group_strides[] = {n->groups, 1};
    int group = n->norm == GROUP;

    for (int i = rank - 1; i > 1; i--) {
        strides[i] = step;
        step *= dims[i];
    }
    strides[1] = channels_last ? 1 : step;
    strides[0] = channels_last ? step : step * dims[1];
    return dnnl_memory_desc_create_with_strides(&n->tensor, rank, dims, type, strides) ||
           dnnl_memory_desc_create_with_strides(&n->channels, 1, dims + 1, dnnl_f32, &one) ||
           dnnl_memory_desc_create_with_strides(
               &n->statistics, group ? 2 : 1, group ? of_group : n->norm == BATCH ? dims + 1 : dims,
               dnnl_f32, group ? group_strides : &one);
}

static choice_t chosen(const struct norm *n)
{
    return n->backward ? n->backward : n->forward;
}

static int choose_forward(struct norm *n, unsigned flags)
{
    int saves = n->op == TRAINING || n->op == BACKWARD;
    int kind = saves ? dnnl_forward_training : dnnl_forward_inference;

    if (n->norm == BATCH)
        return dnnl_batch_normalization_forward_primitive_desc_create(
            &n->forward, n->engine, kind, n->tensor, n->tensor, n->eps, flags, NULL);
    if (n->norm == GROUP)
        return dnnl_group_normalization_forward_primitive_desc_create(
            &n->forward, n->engine, kind, n->tensor, n->tensor, n->groups, n->eps, flags, NULL);
    return dnnl_layer_normalization_forward_primitive_desc_create(
        &n->forward, n->engine, kind, n->tensor, n->tensor, n->statistics, n->eps, flags, NULL);
}

static int choose_backward(struct norm *n, unsigned flags)
{
    if (n->norm == BATCH)
        return dnnl_batch_normalization_backward_primitive_desc_create(
            &n->backward, n->engine, dnnl_backward, n->tensor, n->tensor, n->tensor, n->eps,
            flags, n->forward, NULL);
    if (n->norm == GROUP)
        return dnnl_group_normalization_backward_primitive_desc_create(
            &n->backward, n->engine, dnnl_backward, n->tensor, n->tensor, n->tensor, n->groups,
            n->eps, flags, n->forward, NULL);
    return dnnl_layer_normalization_backward_primitive_desc_create(
        &n->backward, n->engine, dnnl_backward, n->tensor, n->tensor, n->tensor, n->statistics,
        n->eps, flags, n->forward, NULL);
}

static int choose(struct norm *n)
{
    unsigned flags = dnnl_use_scale | (n->norm == RMS ? dnnl_rms_norm : dnnl_use_shift);

    if (n->norm == GROUP && !dnnl_group_normalization_forward_primitive_desc_create)
        return 1;
    if (n->norm == RMS && n->op == BACKWARD) /* 3.13 subtracts a mean there, which is wrong */
        return 1;
    if (n->op == INFERENCE)
        flags |= dnnl_use_global_stats;
    return choose_forward(n, flags) || (n->op == BACKWARD && choose_backward(n, flags)) ||
           dnnl_primitive_create(&n->primitive, chosen(n));
}

/* oneDNN accepts memory without data and fails only later, so NULL is refused here. */
static int attach(struct norm *n, int index, layout_t layout, void *data)
{
    argument_t *argument = &n->arguments[n->count];

    if (!data || dnnl_memory_create(&argument->memory, layout, n->engine, data))
        return 1;
    argument->index = index;
    n->count++;
    return 0;
}

void norm_free(void *prepared)
{
    struct norm *n = prepared;

    if (!n)
        return;
    while (n->count > 0)
        dnnl_memory_destroy(n->arguments[--n->count].memory);
    dnnl_primitive_destroy(n->primitive);
    dnnl_primitive_desc_destroy(n->backward);
    dnnl_primitive_desc_destroy(n->forward);
    dnnl_memory_desc_destroy(n->statistics);
    dnnl_memory_desc_destroy(n->channels);
    dnnl_memory_desc_destroy(n->tensor);
    dnnl_stream_destroy(n->stream);
    dnnl_engine_destroy(n->engine);
    free(n);
}

/* norm: 0 batch, 1 layer, 2 rms, 3 group with so many groups. op: 0 inference with the
   given mean and variance, 1 training forward, which writes them (both only batch), 2
   forward without them, 3 backward. type: oneDNN's number of the tensors' type; vectors are
   float32. dims: N, C, then the spatial sizes; in memory x, dy and out are N, spatial
   sizes, C if channels_last. The variance is the biased one.
   Data an op does not use may be NULL, the rest must outlive the result. NULL on failure. */
void *norm_prepare(int norm, int op, int type, int groups, int channels_last, int rank,
                   const int64_t *dims, float eps, void *x, void *dy, void *out, float *mean,
                   float *variance, float *weight, float *bias, float *dweight, float *dbias)
{
    int known = rank >= 2 && rank <= MAX_RANK;
    struct norm *n = known ? calloc(1, sizeof *n) : NULL;
    int failed;

    if (!n)
        return NULL;
    n->norm = norm;
    n->op = op;
    n->groups = groups;
    n->eps = eps;
    failed = dnnl_engine_create(&n->engine, dnnl_cpu, 0) ||
             dnnl_stream_create(&n->stream, n->engine, dnnl_stream_in_order) ||
             describe(n, type, channels_last, rank, dims) || choose(n) ||
             attach(n, DNNL_ARG_SRC, n->tensor, x) ||
             attach(n, DNNL_ARG_SCALE, n->channels, weight);
    if (op != FORWARD)
        failed = failed || attach(n, DNNL_ARG_VARIANCE, n->statistics, variance) ||
                 attach(n, DNNL_ARG_MEAN, n->statistics, mean);
    if (norm == LAYER || (norm != RMS && op != BACKWARD)) /* layer norm's backward wants it, too */
        failed = failed || attach(n, DNNL_ARG_SHIFT, n->channels, bias);
    if (op == BACKWARD)
        failed = failed || attach(n, DNNL_ARG_DIFF_DST, n->tensor, dy) ||
                 attach(n, DNNL_ARG_DIFF_SRC, n->tensor, out) ||
                 attach(n, DNNL_ARG_DIFF_SCALE, n->channels, dweight) ||
                 attach(n, DNNL_ARG_DIFF_SHIFT, n->channels, dbias);
    else
        failed = failed || attach(n, DNNL_ARG_DST, n->tensor, out);
    if (!failed)
        return n;
    norm_free(n);
    return NULL;
}

/* Waits after each execution, as a caller that needs the result would. Returns 0 or
   oneDNN's status. */
int norm_run(void *prepared, int count)
{
    struct norm *n = prepared;
    int status = 0;

    while (!status && count-- > 0) {
        status = dnnl_primitive_execute(n->primitive, n->stream, n->count, n->arguments);
        if (!status)
            status = dnnl_stream_wait(n->stream);
    }
    return status;
}

/* oneDNN's own name of the implementation it picked, which tells jit kernels from plain
   loops. Valid until norm_free, NULL on failure. */
const char *norm_implementation(void *prepared)
{
    const char *name = NULL;

    if (dnnl_primitive_desc_query(chosen(prepared), dnnl_query_impl_info_str, 0, &name))
        return NULL;
    return name;
}
