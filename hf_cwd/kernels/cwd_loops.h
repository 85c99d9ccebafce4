/* The loops of cwd.c for one instruction set: LEVEL(name) is a function's name in it, TARGET its attribute. */

/* Elements begin .. end, no more than BLOCK, for every rule and dtype: the first six arguments are constants where it is
 * called. */
ALWAYS_INLINE TARGET void LEVEL(span)(int op, int x_type, int g_type, int m_type, int v_type, int sum, const Tensor *t,
                                      int64_t begin, int64_t end, const Row *r, Lanes *lanes) {
    const int has_m = op != APPLY, has_v = op == ADAMW;
#pragma omp simd
    for (int64_t i = begin; i < end; i++) {
        float g = r->grad_scale * load(g_type, t->g, 0, i), u = g, x = 0, m = 0, v = 0;
        int decayed = 0;
        if (op != DIRECTIONS) x = load(x_type, t->x, t->remainder, i);
        if (has_m) m = load(m_type, t->m, 0, i);
        if (has_v) v = load(v_type, t->v, 0, i);
        float before = x;
        switch (op) {
        case ADAMW: u = adamw(r, g, &m, &v); break;
        case LION: u = lion(r, g, &m); break;
        case MOMENTUM:
        case DIRECTIONS: u = momentum(r, g, &m); break;
        }
        x = op == DIRECTIONS ? u : applied(r, x, u, &decayed);
        store(x_type, t->x, t->remainder, i, x);
        if (has_m) store(m_type, t->m, 0, i, m);
        if (has_v) store(v_type, t->v, 0, i, v);
        if (sum) {
            float among = number(bits(before) & -(uint32_t)decayed); /* 0 where it is not decayed, also of infinity */
            lanes->decayed[i - begin] += (float)decayed;
            float poison = (m - m) + (v - v); /* NaN where a state is not finite: u can be 0 there for ever */
            lanes->update[i - begin] = fmaf(u, u, lanes->update[i - begin]) + poison;
            lanes->weight[i - begin] = fmaf(before, before, lanes->weight[i - begin]);
            lanes->among[i - begin] = fmaf(among, among, lanes->among[i - begin]);
        }
    }
}

static TARGET void LEVEL(flush)(Lanes *lanes, double *sums) {
    for (int i = 0; i < BLOCK; i++) {
        sums[0] += lanes->decayed[i];
        sums[1] += lanes->update[i];
        sums[2] += lanes->weight[i];
        sums[3] += lanes->among[i];
    }
    memset(lanes, 0, sizeof *lanes);
}

/* A few cache lines of each stream at a time, and those that come AHEAD later are asked for. With several streams the
 * processor by itself does that less well: 7 % of AdamW's time in one thread of a Zen 5, nothing where memory is the
 * limit. */
ALWAYS_INLINE TARGET void LEVEL(loop)(int op, int x_type, int g_type, int m_type, int v_type, int sum, Tensor t,
                                      int64_t n, const Row *row, double *sums) {
    const Row r = *row;
    Lanes lanes = {0};
    int64_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        prefetch(x_type, t.x, i + AHEAD);
        prefetch(g_type, t.g, i + AHEAD);
        if (op != APPLY) prefetch(m_type, t.m, i + AHEAD);
        if (op == ADAMW) prefetch(v_type, t.v, i + AHEAD);
        if (x_type == MASTER) prefetch(MASTER, t.remainder, i + AHEAD);
        LEVEL(span)(op, x_type, g_type, m_type, v_type, sum, &t, i, i + BLOCK, &r, &lanes);
        if (sum && (i / BLOCK + 1) % FLUSH == 0) LEVEL(flush)(&lanes, sums);
    }
    LEVEL(span)(op, x_type, g_type, m_type, v_type, sum, &t, i, n, &r, &lanes);
    if (sum) LEVEL(flush)(&lanes, sums);
}

/* The loop of common combinations, and of everything in fp32; 0 if there is none. */
static TARGET int LEVEL(direct)(const Job *job, Tensor t, int64_t n, const Row *row, double *sums) {
    switch (KEY(job->op, job->x, job->g, job->m, job->v, job->sum)) {
#define CASE(op, x, g, m, v, sum)                                                                                      \
    case KEY(op, x, g, m, v, sum): LEVEL(loop)(op, x, g, m, v, sum, t, n, row, sums); return 1;
        COMBINATIONS(CASE)
#undef CASE
    default: return 0;
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
static TARGET void LEVEL(staged)(const Job *job, Tensor t, int64_t n, const Row *row, double *sums) {
    float stage[4][STAGE];
    Job wide = *job;
    Tensor w = t;
    wide.x = wide.g = wide.m = wide.v = F32;
    if (job->op != DIRECTIONS || job->x == F32) w.x = LEVEL(widen)(job->x, t.x, t.remainder, n, stage[0]);
    else w.x = (char *)stage[0]; /* an output, with nothing in it yet */
    w.g = LEVEL(widen)(job->g, t.g, 0, n, stage[1]);
    if (t.m) w.m = LEVEL(widen)(job->m, t.m, 0, n, stage[2]);
    if (t.v) w.v = LEVEL(widen)(job->v, t.v, 0, n, stage[3]);
    LEVEL(direct)(&wide, w, n, row, sums);
    LEVEL(narrow)(job->x, t.x, t.remainder, n, stage[0]);
    if (t.m) LEVEL(narrow)(job->m, t.m, 0, n, stage[2]);
    if (t.v) LEVEL(narrow)(job->v, t.v, 0, n, stage[3]);
}

/* A chunk of a tensor; its sums, if they are asked for, are set. */
static TARGET void LEVEL(run)(const Job *job, Tensor t, int64_t n, const Row *row, double *sums) {
    if (sums) memset(sums, 0, COLUMNS * sizeof *sums);
    if (LEVEL(direct)(job, t, n, row, sums)) return;
    for (int64_t at = 0; at < n; at += STAGE)
        LEVEL(staged)(job, from(job, t, at), n - at < STAGE ? n - at : STAGE, row, sums);
}
