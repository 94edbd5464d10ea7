/* Decode attention over slabs for a whole batch in one call; see slab_attention.py for the arguments. */
#include "slab_step.h"

void slab_rows_base(void *step);

#if defined(__x86_64__)
void slab_rows_avx2(void *step);
void slab_rows_avx512(void *step);

static Work fastest(void) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma")) return slab_rows_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return slab_rows_avx2;
    return slab_rows_base;
}
#else
static Work fastest(void) { return slab_rows_base; }
#endif

/* Less is done sooner than another thread has heard of it. */
#define ELEMENTS_WORTH_SHARING (1 << 14)

static int worth_sharing(const Step *step) {
    int64_t tokens = 0;
    for (int64_t row = 0; row < step->rows; row++) tokens += step->lengths[row];
    return tokens * step->head_dim >= ELEMENTS_WORTH_SHARING;
}

/* GOMP_parallel of the OpenMP runtime that torch uses: a second pool of threads would fight with it for the cores. */
typedef void (*Parallel)(Work work, void *data, unsigned threads, unsigned flags);

void slab_attention(const void *query, const void *key, const void *value, void *out, void *pool, const int64_t *key_at,
                    const int64_t *value_at, const int64_t *lengths, const int64_t *shared_key_at,
                    const int64_t *shared_value_at, const int64_t *shared_lengths, int64_t rows, int64_t group,
                    int64_t head_dim, float scaling, int is_bf16, Parallel parallel, unsigned threads) {
    Step step = {.query = query, .key = key, .value = value, .out = out, .pool = pool, .key_at = key_at,
                 .value_at = value_at, .lengths = lengths, .shared_key_at = shared_key_at,
                 .shared_value_at = shared_value_at, .shared_lengths = shared_lengths, .rows = rows, .group = group,
                 .head_dim = head_dim, .scaling = scaling, .is_bf16 = is_bf16, .threads = 1};
    if (!parallel || threads < 2 || !worth_sharing(&step)) {
        fastest()(&step);
        return;
    }
    step.threads = threads;
    parallel(fastest(), &step, threads, 0);
}
