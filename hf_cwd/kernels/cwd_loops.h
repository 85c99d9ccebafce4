/* The loops of cwd.c for one instruction set: LEVEL(name) is a function's name in it, TARGET its attribute. */

/* Elements begin .. end, for every rule and dtype: the first six arguments are constants where it is called. */
ALWAYS_INLINE TARGET int32_t LEVEL(span)(int op, int x_type, int g_type, int m_type, int v_type, int count,
                                         const Tensor *t, int64_t begin, int64_t end, const Row *r) {
    const int has_m = op != APPLY, has_v = op == ADAMW || op == FLOOR4;
    int32_t decayed = 0;
#pragma omp simd reduction(+ : decayed)
    for (int64_t i = begin; i < end; i++) {
        float g = r->grad_scale * load(g_type, t->g, 0, i), u = g, x = 0, m = 0, v = 0;
        int32_t is_decayed = 0;
        if (op != DIRECTIONS) x = load(x_type, t->x, t->remainder, i);
        if (has_m) m = load(m_type, t->m, 0, i);
        if (has_v) v = load(v_type, t->v, 0, i);
        switch (op) {
        case ADAMW: u = adamw(r, g, &m, &v); break;
        case LION: u = lion(r, g, &m); break;
        case MOMENTUM:
        case DIRECTIONS: u = momentum(r, g, &m); break;
        }
        switch (op) {
        case DIRECTIONS: x = u; break;
        case FLOOR4: v += g; /* fall through */
        case FLOOR3: m += g, x += g; break;
        default: x = applied(r, x, u, &is_decayed);
        }
        store(x_type, t->x, t->remainder, i, x);
        if (has_m) store(m_type, t->m, 0, i, m);
        if (has_v) store(v_type, t->v, 0, i, v);
        if (count) decayed += is_decayed;
    }
    return decayed;
}

/* A few cache lines of each stream at a time, and those that come AHEAD later are asked for. With several streams the
 * processor by itself does that less well: 7 % of AdamW's time in one thread of a Zen 5, nothing where memory is the
 * limit. */
ALWAYS_INLINE TARGET int32_t LEVEL(loop)(int op, int x_type, int g_type, int m_type, int v_type, int count, Tensor t,
                                         int64_t n, const Row *row) {
    const Row r = *row;
    int32_t decayed = 0;
    int64_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        prefetch(x_type, t.x, i + AHEAD);
        prefetch(g_type, t.g, i + AHEAD);
        if (op != APPLY) prefetch(m_type, t.m, i + AHEAD);
        if (op == ADAMW || op == FLOOR4) prefetch(v_type, t.v, i + AHEAD);
        if (x_type == MASTER) prefetch(MASTER, t.remainder, i + AHEAD);
        decayed += LEVEL(span)(op, x_type, g_type, m_type, v_type, count, &t, i, i + BLOCK, &r);
    }
    return decayed + LEVEL(span)(op, x_type, g_type, m_type, v_type, count, &t, i, n, &r);
}

/* The loop of common combinations, and of everything in fp32; -1 if there is none. */
static TARGET int32_t LEVEL(direct)(const Job *job, Tensor t, int64_t n, const Row *row) {
    switch (KEY(job->op, job->x, job->g, job->m, job->v, job->count)) {
#define CASE(op, x, g, m, v, count)                                                                                    \
    case KEY(op, x, g, m, v, count): return LEVEL(loop)(op, x, g, m, v, count, t, n, row);
        COMBINATIONS(CASE)
#undef CASE
    default: return -1;
    }
}

/* An fp32 copy in the stage; what is fp32 already stays where it is. */
static TARGET char *LEVEL(widen)(int dtype, char *from, const char *remainder, int64_t n, float *stage) {
    switch (dtype) {
#define CASE(dtype)                                                                                                    \
    case dtype:                                                                                                        \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) stage[i] = load(dtype, from, remainder, i);                \
        return (char *)stage;
        CASE(BF16)
        CASE(F16)
        CASE(MASTER)
#undef CASE
    default: return from;
    }
}

static TARGET void LEVEL(narrow)(int dtype, char *to, char *remainder, int64_t n, const float *stage) {
    switch (dtype) {
#define CASE(dtype)                                                                                                    \
    case dtype:                                                                                                        \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) store(dtype, to, remainder, i, stage[i]);                  \
        return;
        CASE(BF16)
        CASE(F16)
        CASE(MASTER)
#undef CASE
    }
}

/* Any other combination: blocks are widened to fp32, stepped there, and narrowed. */
static TARGET int32_t LEVEL(staged)(const Job *job, Tensor t, int64_t n, const Row *row) {
    float stage[4][STAGE];
    Job wide = *job;
    Tensor w = t;
    wide.x = wide.g = wide.m = wide.v = F32;
    if (job->op != DIRECTIONS || job->x == F32) w.x = LEVEL(widen)(job->x, t.x, t.remainder, n, stage[0]);
    else w.x = (char *)stage[0]; /* an output, with nothing in it yet */
    w.g = LEVEL(widen)(job->g, t.g, 0, n, stage[1]);
    if (t.m) w.m = LEVEL(widen)(job->m, t.m, 0, n, stage[2]);
    if (t.v) w.v = LEVEL(widen)(job->v, t.v, 0, n, stage[3]);
    int32_t decayed = LEVEL(direct)(&wide, w, n, row);
    LEVEL(narrow)(job->x, t.x, t.remainder, n, stage[0]);
    if (t.m) LEVEL(narrow)(job->m, t.m, 0, n, stage[2]);
    if (t.v) LEVEL(narrow)(job->v, t.v, 0, n, stage[3]);
    return decayed;
}

/* A chunk of a tensor. */
static TARGET int32_t LEVEL(run)(const Job *job, Tensor t, int64_t n, const Row *row) {
    int32_t decayed = LEVEL(direct)(job, t, n, row);
    if (decayed >= 0) return decayed;
    decayed = 0;
    for (int64_t at = 0; at < n; at += STAGE)
        decayed += LEVEL(staged)(job, from(job, t, at), n - at < STAGE ? n - at : STAGE, row);
    return decayed;
}
