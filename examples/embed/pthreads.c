/* SPDX-License-Identifier: BSD-3-Clause
 * Threads of one's own in C: batch norm in training of an NCHW tensor of float32, from
 * standard input to standard output.
 *
 *     ./pthreads 32 64 56 56 < x > y */
#include <fastbn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { WORKERS = 4 };

static const fastbn_api *fastbn;
static void *workspace;
static pthread_barrier_t barrier;

/* A share of the tasks of each phase. */
static void *work(void *number)
{
    int worker = (int)(size_t)number, phases = fastbn->phases(workspace);
    for (int phase = 0; phase < phases; phase++) {
        ptrdiff_t tasks = fastbn->tasks(workspace, phase);
        fastbn->run_tasks(workspace, phase, tasks * worker / WORKERS,
                          tasks * (worker + 1) / WORKERS, worker);
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

static int fail(int code)
{
    fprintf(stderr, "%s\n", fastbn->error_message(code));
    return code;
}

int main(int argc, char **argv)
{
    ptrdiff_t shape[4];
    size_t count = 1, size;
    pthread_t threads[WORKERS];
    fastbn_call call = {sizeof call, FASTBN_BATCH_NORM, FASTBN_FORWARD, FASTBN_FLOAT32};
    if ((fastbn = fastbn_get_api()) == NULL || argc != 5)
        return 1;
    for (int axis = 0; axis < 4; axis++)
        count *= (size_t)(shape[axis] = atol(argv[axis + 1]));
    call.ndim = 4, call.channel_axis = 1, call.shape = shape, call.eps = 1e-5;
    float *x = malloc(count * sizeof *x);
    if (x == NULL || fread(x, sizeof *x, count, stdin) != count)
        return 1;
    call.x.data = call.out.data = x;

    int code = fastbn->workspace_size(&call, WORKERS, &size);
    if (code != FASTBN_OK)
        return fail(code);
    workspace = malloc(size);
    if ((code = fastbn->begin(&call, WORKERS, workspace, size)) != FASTBN_OK)
        return fail(code);
    pthread_barrier_init(&barrier, NULL, WORKERS);
    for (size_t k = 0; k < WORKERS; k++)
        pthread_create(&threads[k], NULL, work, (void *)k);
    for (int k = 0; k < WORKERS; k++)
        pthread_join(threads[k], NULL);
    fastbn->finish(workspace);
    free(workspace);
    return fwrite(x, sizeof *x, count, stdout) != count;
}
