/* The fused CPU kernel: one pass over memory a step. Plain C11, called through ctypes; kernels/c.py is its only caller.
 *
 * All arithmetic is fp32. A fused multiply-add is written fmaf and nothing else is contracted (-ffp-contract=off), so
 * every instruction set, vector width and number of threads gives the same bits.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { ADAMW, LION, MOMENTUM, DIRECTIONS, APPLY };
enum { F32, BF16, F16, MASTER }; /* MASTER: bf16 and an int16 remainder, which are an fp32 together */

#define CHUNK 16384 /* elements of the pieces that threads share: whole vectors of any length */
#define STAGE 1024  /* elements that are widened to fp32 at a time: four such stages fit a level 1 cache */
#define BLOCK 32    /* elements between prefetches, */
#define AHEAD 512   /* and how far ahead they reach */
#define FLUSH 64    /* blocks whose sums are kept in fp32, each element's place in a block for itself */
#define COLUMNS 4   /* of sums: decayed elements, u^2, x^2, decayed x^2 */

/* kernels/interface.py has the meaning of each; the order is its own. */
typedef struct {
    float grad_scale, first_weight, first_far, second_weight, second_far, keep, take, root_scale, eps, direction_scale,
        opposed, aligned, neither, decays, rate, form;
} Row;

/* One parameter. x: parameter, or the output of DIRECTIONS; g: gradient, or the direction of APPLY; m, v: states. */
typedef struct {
    char *x, *g, *m, *v, *remainder;
    int64_t numel, row, chunks; /* chunks: of this tensor and all before it, filled in by cwd_run */
} Tensor;

typedef struct {
    int op, x, g, m, v, sum, level, threads; /* x, g, m, v: dtypes */
    int64_t tensors;
    Tensor *tensor;
    const Row *rows;
    double *sums; /* COLUMNS for each tensor, then room for as many for each chunk; not looked at without sum */
    int64_t next; /* shared by the threads, zero at first */
} Job;

/* Sums over elements, before they are added up. */
typedef struct {
    float decayed[BLOCK], update[BLOCK], weight[BLOCK], among[BLOCK];
} Lanes;

/* ---- numbers ---- */

ALWAYS_INLINE uint32_t bits(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
}

ALWAYS_INLINE float number(uint32_t word) {
    float value;
    memcpy(&value, &word, 4);
    return value;
}

ALWAYS_INLINE float from_half(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    float finite = number(magnitude) * 0x1p112f; /* exact, subnormal halves too */
    uint32_t word = magnitude < 0x0f800000 ? bits(finite) : magnitude | 0x7f800000;
    return number(word | (uint32_t)(half & 0x8000) << 16);
}

ALWAYS_INLINE uint16_t to_half(float value) {
    uint32_t magnitude = bits(value) & 0x7fffffff, sign = bits(value) >> 16 & 0x8000;
    uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    uint32_t subnormal = bits(number(magnitude) + 0.5f) - bits(0.5f); /* one ulp of 1/2 is the least half */
    uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    uint32_t word = magnitude < 0x38800000 ? subnormal : magnitude < 0x477ff000 ? normal : special;
    return (uint16_t)(word | sign);
}

ALWAYS_INLINE uint16_t to_bfloat(float value) {
    uint32_t word = bits(value), rounded = word + 0x7fff + (word >> 16 & 1); /* ties to even */
    return (uint16_t)((value != value ? 0x7fc00000 : rounded) >> 16);
}

ALWAYS_INLINE float load(int dtype, const char *from, const char *remainder, int64_t i) {
    const uint16_t *half = (const uint16_t *)from;
    switch (dtype) {
    case F32: return ((const float *)from)[i];
    case F16: return from_half(half[i]);
    case BF16: return number((uint32_t)half[i] << 16);
    default: return number(((uint32_t)half[i] << 16) + (uint32_t)(int32_t)((const int16_t *)remainder)[i]);
    }
}

ALWAYS_INLINE void store(int dtype, char *to, char *remainder, int64_t i, float value) {
    uint16_t *half = (uint16_t *)to;
    switch (dtype) {
    case F32: ((float *)to)[i] = value; return;
    case F16: half[i] = to_half(value); return;
    case BF16: half[i] = to_bfloat(value); return;
    default: {
        uint32_t word = value != value ? 0x7fc00000 : bits(value);
        uint32_t upper = (word + 0x8000) >> 16; /* half up in magnitude: what is missing then fits an int16 */
        half[i] = (uint16_t)upper;
        ((int16_t *)remainder)[i] = (int16_t)(word - (upper << 16));
    }
    }
}

ALWAYS_INLINE void prefetch(int dtype, const char *from, int64_t i) {
    const int size = dtype == F32 ? 4 : 2;
    for (int byte = 0; byte < BLOCK * size; byte += 64) __builtin_prefetch(from + i * size + byte);
}

/* ---- rules: kernels/eager.py and rules/ are the specification ---- */

ALWAYS_INLINE float lerp(float s, float e, float weight, float far) {
    return fmaf(weight, e - s, far != 0 ? e : s);
}

ALWAYS_INLINE float adamw(const Row *r, float g, float *m, float *v) {
    *m = lerp(*m, g, r->first_weight, r->first_far);
    *v = fmaf(r->take * g, g, r->keep * *v);
    return *m / (sqrtf(*v) * r->root_scale + r->eps) * r->direction_scale;
}

ALWAYS_INLINE float lion(const Row *r, float g, float *m) {
    float c = lerp(*m, g, r->first_weight, r->first_far);
    *m = lerp(*m, g, r->second_weight, r->second_far);
    return fabsf(c) > 0 ? copysignf(1, c) : 0;
}

/* All bits of a where the condition holds, else those of b: with a ?: here gcc 12 does not vectorise momentum(). */
ALWAYS_INLINE float choose(int condition, float a, float b) {
    uint32_t mask = -(uint32_t)(condition != 0);
    return number((bits(a) & mask) | (bits(b) & ~mask));
}

/* All forms are computed, and one is selected: that costs less than the loops would. */
ALWAYS_INLINE float momentum(const Row *r, float g, float *m) {
    int form = (int)r->form, is_first = (form & 3) == 1, is_average = (form & 3) == 3;
    float sgd = fmaf(r->take, g, r->keep * *m), average = lerp(*m, g, r->first_weight, r->first_far);
    *m = choose(is_first, g, choose(is_average, average, sgd));
    float sgd_ahead = fmaf(r->keep, *m, g), average_ahead = lerp(g, *m, r->second_weight, r->second_far);
    return choose(form & 4, choose(is_average, average_ahead, sgd_ahead), *m);
}

/* THE mask, in this language: signs of u and x, never their product. Then the decay, then the update. */
ALWAYS_INLINE float applied(const Row *r, float x, float u, int *decayed) {
    uint32_t differ = (uint32_t)((int32_t)(bits(u) ^ bits(x)) >> 31);
    float known = number((bits(r->opposed) & differ) | (bits(r->aligned) & ~differ));
    int both = (fabsf(u) > 0) & (fabsf(x) > 0); /* NaN is neither */
    float coefficient = both ? known : r->neither;
    *decayed = (r->decays != 0) & (bits(coefficient) != 0x80000000);
    return fmaf(r->rate, u, r->decays != 0 ? fmaf(coefficient, x, x) : x);
}

/* ---- loops, compiled for each instruction set ---- */

/* A loop of its own: everything in fp32, which all else is widened to, and what training in bf16 uses. */
#define COMBINATIONS(CASE)                                                                                             \
    CASE(ADAMW, F32, F32, F32, F32, 0)                                                                                 \
    CASE(ADAMW, F32, F32, F32, F32, 1)                                                                                 \
    CASE(ADAMW, BF16, BF16, F32, F32, 0)                                                                               \
    CASE(ADAMW, BF16, BF16, F32, F32, 1)                                                                               \
    CASE(ADAMW, MASTER, BF16, F32, F32, 0)                                                                             \
    CASE(ADAMW, MASTER, BF16, F32, F32, 1)                                                                             \
    CASE(ADAMW, BF16, BF16, BF16, BF16, 0)                                                                             \
    CASE(ADAMW, BF16, BF16, BF16, BF16, 1)                                                                             \
    CASE(LION, F32, F32, F32, F32, 0)                                                                                  \
    CASE(LION, F32, F32, F32, F32, 1)                                                                                  \
    CASE(LION, BF16, BF16, F32, F32, 0)                                                                                \
    CASE(LION, BF16, BF16, F32, F32, 1)                                                                                \
    CASE(LION, MASTER, BF16, F32, F32, 0)                                                                              \
    CASE(LION, MASTER, BF16, F32, F32, 1)                                                                              \
    CASE(LION, BF16, BF16, BF16, F32, 0)                                                                               \
    CASE(LION, BF16, BF16, BF16, F32, 1)                                                                               \
    CASE(MOMENTUM, F32, F32, F32, F32, 0)                                                                              \
    CASE(MOMENTUM, F32, F32, F32, F32, 1)                                                                              \
    CASE(DIRECTIONS, F32, F32, F32, F32, 0)                                                                            \
    CASE(APPLY, F32, F32, F32, F32, 0)                                                                                 \
    CASE(APPLY, F32, F32, F32, F32, 1)
#define KEY(op, x, g, m, v, sum) ((((((op)*4 + (x)) * 4 + (g)) * 4 + (m)) * 4 + (v)) * 2 + (sum))

ALWAYS_INLINE Tensor from(const Job *job, Tensor t, int64_t at) {
    static const int SIZE[] = {[F32] = 4, [BF16] = 2, [F16] = 2, [MASTER] = 2};
    t.x += at * SIZE[job->x];
    t.g += at * SIZE[job->g];
    if (t.m) t.m += at * SIZE[job->m];
    if (t.v) t.v += at * SIZE[job->v];
    if (t.remainder) t.remainder += at * 2;
    return t;
}

typedef void Run(const Job *, Tensor, int64_t, const Row *, double *);

#define LEVEL(name) name##_baseline
#define TARGET
#include "cwd_loops.h"

#if defined(__x86_64__) && defined(__GNUC__)
#undef LEVEL
#undef TARGET
#define LEVEL(name) name##_v3
#define TARGET __attribute__((target("avx2,bmi,bmi2,f16c,fma,lzcnt,movbe")))
#include "cwd_loops.h"

#undef LEVEL
#undef TARGET
#define LEVEL(name) name##_v4
#define TARGET __attribute__((target("avx2,bmi,bmi2,f16c,fma,lzcnt,movbe,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")))
#include "cwd_loops.h"

static Run *const RUN[] = {run_baseline, run_v3, run_v4};

/* The highest level that this processor has; -1 if it has no fused multiply-add, and fmaf is a slow function. */
int cwd_level(void) {
    __builtin_cpu_init();
    int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    int v4 = v3 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    return v4 ? 2 : v3 ? 1 : -1;
}
#else
static Run *const RUN[] = {run_baseline};

int cwd_level(void) {
#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
    return 0;
#else
    return -1;
#endif
}
#endif

/* ---- threads ---- */

/* What each thread does: takes a run of neighbouring chunks while there are any, long ones first and short ones at the
 * end. Memory is walked far in a straight line, and yet a thread that was held up leaves the rest to the others. No
 * chunk's result depends on who takes it. */
static void work(void *argument) {
    Job *job = argument;
    const Tensor *t = job->tensor;
    int64_t all = t[job->tensors - 1].chunks, next = __atomic_load_n(&job->next, __ATOMIC_RELAXED);
    int64_t before = 0;
    while (next < all) {
        int64_t take = 1 + (all - next) / (8 * job->threads), end = next + take;
        if (!__atomic_compare_exchange_n(&job->next, &next, end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
        for (; next < end; next++) {
            for (; t->chunks <= next; t++) before = t->chunks;
            int64_t at = (next - before) * CHUNK, rest = t->numel - at;
            double *sums = job->sum ? job->sums + (job->tensors + next) * COLUMNS : 0;
            RUN[job->level](job, from(job, *t, at), rest < CHUNK ? rest : CHUNK, &job->rows[t->row], sums);
        }
        next = __atomic_load_n(&job->next, __ATOMIC_RELAXED);
    }
}

/* The sums of chunks, added up for each tensor in their order: the same whoever took which chunk. */
static void add_up(Job *job) {
    const double *from = job->sums + job->tensors * COLUMNS;
    int64_t chunk = 0;
    for (int64_t t = 0; t < job->tensors; t++) {
        double *to = job->sums + t * COLUMNS;
        memset(to, 0, COLUMNS * sizeof *to);
        for (; chunk < job->tensor[t].chunks; chunk++)
            for (int c = 0; c < COLUMNS; c++) to[c] += from[chunk * COLUMNS + c];
    }
}

const int cwd_chunk = CHUNK;

/* Runs a job. team: GOMP_parallel of the OpenMP runtime that the process already has, so that there are not two whose
 * threads wait for each other's cores; NULL: this thread alone. */
void cwd_run(Job *job, void (*team)(void (*)(void *), void *, unsigned, unsigned)) {
    int64_t chunks = 0, elements = 0;
    for (int64_t t = 0; t < job->tensors; t++) {
        elements += job->tensor[t].numel;
        job->tensor[t].chunks = chunks += (job->tensor[t].numel + CHUNK - 1) / CHUNK;
    }
    if (team && job->threads > 1 && elements >= 2 * CHUNK) /* less is done before the others have woken up */
        team(work, job, (unsigned)job->threads, 0);
    else if (elements)
        work(job);
    if (job->sum) add_up(job);
}
