/* What one call asks for; the threads that work on it share it. */
#ifndef SLAB_STEP_H
#define SLAB_STEP_H

#include <stdatomic.h>
#include <stdint.h>

typedef struct {
    const void *query;       /* [rows, group, head_dim]; rows are batch x num_kv_heads */
    const void *key, *value; /* [rows, head_dim], of the new token */
    void *out;               /* as query */
    void *pool;
    const int64_t *key_at, *value_at; /* [rows], in elements of the pool */
    const int64_t *lengths;           /* [rows], the new token included */
    /* [rows] of what other sequences read as well, before a row's own slab; null where nobody shares anything */
    const int64_t *shared_key_at, *shared_value_at, *shared_lengths;
    int64_t rows, group, head_dim;
    float scaling;
    int is_bf16; /* or else fp32 */
    int64_t threads;
    atomic_long next; /* row that no thread has taken */
} Step;

typedef void (*Work)(void *step);

#endif
