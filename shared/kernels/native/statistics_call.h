/* What one call asks for, as statistics.py lays it out; the threads that work on it share it. */
#ifndef STATISTICS_CALL_H
#define STATISTICS_CALL_H

#include <stdatomic.h>
#include <stdint.h>

#define BLOCK_ROWS 64 /* attention rows of a KV head that a thread takes at once */
#define TILE_KEYS 16

typedef struct {
    const char *query;     /* [num_kv_heads * group, rows, head_dim] bf16 */
    const char *key;       /* [num_kv_heads, num_keys, head_dim] bf16 */
    const uint8_t *visual; /* [num_keys], 1 or 0; NULL asks for no masses */
    float *columns;        /* [num_kv_heads, num_keys], sums */
    int32_t *counts;       /* [num_kv_heads * group, rows] */
    float *masses;         /* [2, num_kv_heads * group, rows]: on visual keys, on others */
    float *parts;          /* [num_kv_heads, blocks, padded_keys], what each block adds to the columns */
    float *weights;        /* [threads, BLOCK_ROWS * padded_keys], scratch */
    int64_t query_head_bytes, query_row_bytes, key_head_bytes, key_bytes; /* from one to the next */
    int64_t num_kv_heads, group, rows, num_keys, head_dim;
    int64_t blocks;      /* of a KV head's rows */
    int64_t padded_keys; /* whole tiles */
    float scaling, threshold;
    atomic_long next_block;  /* of all KV heads, that no thread has taken */
    atomic_long next_thread; /* that has not begun */
} Call;

#endif
