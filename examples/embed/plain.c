/* SPDX-License-Identifier: BSD-3-Clause
 * A plain C program: layer norm of three rows, on one thread. */
#include <fastbn.h>
#include <stdio.h>
#include <stdlib.h>

int main(void)
{
    const fastbn_api *fastbn = fastbn_get_api();
    float x[3][4] = {{1, 2, 3, 4}, {0, 0, 8, 8}, {-1e4f, 1, 2, 3}}, y[3][4];
    const ptrdiff_t shape[2] = {3, 4};
    size_t size;
    fastbn_call call = {sizeof call, FASTBN_LAYER_NORM, FASTBN_FORWARD, FASTBN_FLOAT32};
    call.ndim = 2, call.shape = shape, call.normalized_ndim = 1, call.eps = 1e-5;
    call.x.data = x, call.out.data = y;

    int code = fastbn->workspace_size(&call, 1, &size);
    void *workspace = malloc(size);
    if (code == FASTBN_OK)
        code = fastbn->run(&call, 1, workspace, size);
    for (int i = 0; i < 3 && code == FASTBN_OK; i++)
        printf("%9.6f %9.6f %9.6f %9.6f\n", y[i][0], y[i][1], y[i][2], y[i][3]);
    puts(fastbn->error_message(code));
    free(workspace);
    return code;
}
