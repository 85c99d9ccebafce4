/* The memory traffic of an optimizer's step without its arithmetic: reads all streams of a tensor, and writes all but the
 * gradient. A thread takes every count-th chunk from first on, and walks a chunk's streams side by side, as
 * kernels/cwd.c does. */
#include <stdint.h>

#define CHUNK 16384 /* elements, as in kernels/cwd.c */
#define BLOCK 32    /* elements between prefetches, */
#define AHEAD 512   /* and how far ahead they reach */

static void walk(int streams, float *x, const float *g, float *m, float *v, int64_t n) {
    for (int64_t i = 0; i < n; i += BLOCK) {
        int64_t end = i + BLOCK < n ? i + BLOCK : n;
        for (int line = AHEAD; line < AHEAD + BLOCK; line += 16) {
            __builtin_prefetch(x + i + line, 1);
            __builtin_prefetch(g + i + line, 0);
            __builtin_prefetch(m + i + line, 1);
            if (streams == 4) __builtin_prefetch(v + i + line, 1);
        }
        for (int64_t j = i; j < end; j++) {
            x[j] += g[j];
            m[j] += g[j];
            if (streams == 4) v[j] += g[j];
        }
    }
}

/* address: x, g, m and, of four streams, v of each tensor, all float32. */
void traffic(int streams, int64_t tensors, float *const *address, const int64_t *numel, int64_t first, int64_t count) {
    int64_t chunk = 0;
    for (int64_t t = 0; t < tensors; t++) {
        float *const *a = address + t * streams;
        for (int64_t i = 0; i < numel[t]; i += CHUNK, chunk++) {
            if (chunk % count != first) continue;
            int64_t n = numel[t] - i < CHUNK ? numel[t] - i : CHUNK;
            if (streams == 4) walk(4, a[0] + i, a[1] + i, a[2] + i, a[3] + i, n);
            else walk(3, a[0] + i, a[1] + i, a[2] + i, 0, n);
        }
    }
}
