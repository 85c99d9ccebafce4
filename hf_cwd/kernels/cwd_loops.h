/* The loops of cwd.c for one instruction set: LEVEL(name) is a function's name in it, TARGET its attribute. */

/* One loop for every rule and dtype: op, count and the dtypes are constants where it is called. */
ALWAYS_INLINE TARGET int32_t LEVEL(loop)(int op, int x_type, int g_type, int state, int count, Tensor t, int64_t n,
                                         const Row *row) {
    const Row r = *row;
    int32_t decayed = 0;
#pragma omp simd reduction(+ : decayed)
    for (int64_t i = 0; i < n; i++) {
        float g = r.grad_scale * load(g_type, t.g, 0, i), u = g, m, v;
        if (op != APPLY) m = load(state, t.m, 0, i);
        if (op == ADAMW) v = load(state, t.v, 0, i);
        if (op == ADAMW) u = adamw(&r, g, &m, &v);
        if (op == LION) u = lion(&r, g, &m);
        if (op == MOMENTUM || op == DIRECTIONS) u = momentum(&r, g, &m);
        if (op != APPLY) store(state, t.m, 0, i, m);
        if (op == ADAMW) store(state, t.v, 0, i, v);
        int32_t here = 0;
        float x = op == DIRECTIONS ? u : applied(&r, load(x_type, t.x, t.remainder, i), u, &here);
        store(x_type, t.x, t.remainder, i, x);
        if (count) decayed += here;
    }
    return decayed;
}

static TARGET int32_t LEVEL(wide)(int op, int count, const Tensor *t, int64_t n, const Row *row) {
    if (count)
        switch (op) {
        case ADAMW: return LEVEL(loop)(ADAMW, F32, F32, F32, 1, *t, n, row);
        case LION: return LEVEL(loop)(LION, F32, F32, F32, 1, *t, n, row);
        case MOMENTUM: return LEVEL(loop)(MOMENTUM, F32, F32, F32, 1, *t, n, row);
        default: return LEVEL(loop)(APPLY, F32, F32, F32, 1, *t, n, row);
        }
    switch (op) {
    case ADAMW: return LEVEL(loop)(ADAMW, F32, F32, F32, 0, *t, n, row);
    case LION: return LEVEL(loop)(LION, F32, F32, F32, 0, *t, n, row);
    case MOMENTUM: return LEVEL(loop)(MOMENTUM, F32, F32, F32, 0, *t, n, row);
    case DIRECTIONS: return LEVEL(loop)(DIRECTIONS, F32, F32, F32, 0, *t, n, row);
    default: return LEVEL(loop)(APPLY, F32, F32, F32, 0, *t, n, row);
    }
}

/* An fp32 copy in the stage; what is fp32 already stays where it is. */
static TARGET char *LEVEL(widen)(int dtype, char *from, const char *remainder, int64_t n, float *stage) {
    switch (dtype) {
    case F32: return from;
#define CASE(dtype)                                                                                                    \
    case dtype:                                                                                                        \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) stage[i] = load(dtype, from, remainder, i);                \
        break;
        CASE(BF16)
        CASE(F16)
        CASE(MASTER)
#undef CASE
    }
    return (char *)stage;
}

static TARGET void LEVEL(narrow)(int dtype, char *to, char *remainder, int64_t n, const float *stage) {
    switch (dtype) {
#define CASE(dtype)                                                                                                    \
    case dtype:                                                                                                        \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) store(dtype, to, remainder, i, stage[i]);                  \
        break;
        CASE(BF16)
        CASE(F16)
        CASE(MASTER)
#undef CASE
    }
}

/* Elements at .. at + n of a tensor. */
static TARGET int32_t LEVEL(run)(const Job *job, const Tensor *tensor, int64_t at, int64_t n) {
    static const int SIZE[] = {[F32] = 4, [BF16] = 2, [F16] = 2, [MASTER] = 2};
    float stage[4][STAGE];
    int32_t decayed = 0;
    for (int64_t end = at + n, size; at < end; at += size) {
        int all_wide = job->x == F32 && job->g == F32 && job->m == F32 && job->v == F32;
        size = all_wide || end - at < STAGE ? end - at : STAGE;
        Tensor t = *tensor;
        t.x += at * SIZE[job->x];
        t.g += at * SIZE[job->g];
        if (t.m) t.m += at * SIZE[job->m];
        if (t.v) t.v += at * SIZE[job->v];
        if (t.remainder) t.remainder += at * 2;
        Tensor w = t;
        w.x = job->op == DIRECTIONS && job->x != F32 ? (char *)stage[0] : LEVEL(widen)(job->x, t.x, t.remainder, size, stage[0]);
        w.g = LEVEL(widen)(job->g, t.g, 0, size, stage[1]);
        if (t.m) w.m = LEVEL(widen)(job->m, t.m, 0, size, stage[2]);
        if (t.v) w.v = LEVEL(widen)(job->v, t.v, 0, size, stage[3]);
        decayed += LEVEL(wide)(job->op, job->count, &w, size, &job->rows[t.row]);
        LEVEL(narrow)(job->x, t.x, t.remainder, size, stage[0]);
        if (t.m) LEVEL(narrow)(job->m, t.m, 0, size, stage[2]);
        if (t.v) LEVEL(narrow)(job->v, t.v, 0, size, stage[3]);
    }
    return decayed;
}
