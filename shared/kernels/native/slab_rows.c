/* Decode attention, row by row; a row is one KV head of one sequence. Compiled once per instruction set.
 *
 * One pass over K and V in blocks, with an online softmax in fp32. The query heads of a group share every read. What a
 * caller passes as a literal (number of heads, element type) is constant here too: accumulators stay in registers.
 */
#include "slab_step.h"
#include "vectors.h"

#define BLOCK 32 /* keys between two rescalings: few, for while the softmax runs the memory rests */
#define GROUP 8  /* query heads that share one pass */
#define MAX_HEAD_DIM 256
#define MAX_ROW_BYTES (MAX_HEAD_DIM * sizeof(float))
#define ACCUMULATORS (LANES == 16 ? 16 : 8) /* half of the registers or less: the rest is for operands */

/* A row of K, V or a query. */
typedef struct {
    int dim, bytes;
    int padded; /* floats, in whole units */
    int is_bf16;
} Row;

typedef struct {
    float query[GROUP * MAX_HEAD_DIM], mixed[GROUP * MAX_HEAD_DIM]; /* [heads, padded], as Pairs */
    float weights[GROUP * BLOCK];                                  /* [heads, BLOCK]: logits, then exponentials */
    float highest[GROUP], total[GROUP];                            /* of the logits and exponentials so far */
} __attribute__((aligned(64))) State;

/* Every read of K and V asks for what lies `ahead` bytes further: evenly spaced requests keep the memory busy. */
INLINE Pair load_and_ask_ahead(const char *from, int64_t ahead, const int elements, const int is_bf16) {
    const int bytes = elements * (is_bf16 ? 2 : 4);
    UNROLL for (int line = 0; line < bytes; line += 64)
        __builtin_prefetch((const void *)((intptr_t)from + ahead + line), 0, 2);
    return load_pair(from, elements, is_bf16);
}

INLINE void add_products(Floats dots[LANES], const float *query, const char *key, int at, int64_t ahead, const Row row,
                         const int elements, const int heads) {
    const int keys = LANES / heads;
    Pair queries[4];
    UNROLL for (int h = 0; h < heads; h++) queries[h] = load_pair((const char *)(query + h * row.padded + at), UNIT, 0);
    UNROLL for (int j = 0; j < keys; j++) {
        const char *from = key + j * row.bytes + at * (row.is_bf16 ? 2 : 4);
        const Pair part = load_and_ask_ahead(from, ahead, elements, row.is_bf16);
        UNROLL for (int h = 0; h < heads; h++) {
            dots[h * keys + j] += part.first * queries[h].first;
            dots[h * keys + j] += part.second * queries[h].second;
        }
    }
}

/* Logits of LANES / heads neighbouring keys: as many sums as a vector has lanes, independent of each other. */
INLINE void dot(float *logits, const float *query, const char *key, int64_t ahead, const Row row, const int heads) {
    const int keys = LANES / heads;
    Floats dots[LANES] = {{0}};
    int at = 0;
    for (; at + UNIT <= row.dim; at += UNIT) add_products(dots, query, key, at, ahead, row, UNIT, heads);
    if (at < row.dim) add_products(dots, query, key, at, ahead, row, UNIT / 2, heads);
    const Floats done = sums(dots);
    UNROLL for (int h = 0; h < heads; h++)
        memcpy(logits + h * BLOCK, (const char *)&done + h * keys * sizeof(float), keys * sizeof(float));
}

INLINE void dot_block(float *logits, const float *query, const char *key, int num_keys, int64_t ahead, const Row row,
                      const int heads) {
    const int keys = LANES / heads;
    int j = 0;
    for (; j + keys <= num_keys; j += keys) dot(logits + j, query, key + j * row.bytes, ahead, row, heads);
    if (j < num_keys) {
        /* where the slab ends the pool may end too */
        char rest[LANES * MAX_ROW_BYTES];
        const int bytes = (num_keys - j) * row.bytes;
        memcpy(rest, key + j * row.bytes, bytes);
        memset(rest + bytes, 0, keys * row.bytes - bytes);
        dot(logits + j, query, rest, (intptr_t)key + j * row.bytes - (intptr_t)rest + ahead, row, heads);
    }
}

INLINE void rescale(State *state, int head, float peak, const Row row) {
    const Floats shrink = exp_negative(splat(state->highest[head] - peak));
    float *mixed = state->mixed + head * row.padded;
    for (int i = 0; i < row.padded; i += LANES) store(mixed + i, load(mixed + i) * shrink);
    state->total[head] *= shrink[0];
    state->highest[head] = peak;
}

/* Turns the logits of one head into exponentials relative to the highest logit so far. */
INLINE void exponentials(State *state, int head, int num_keys, const Row row) {
    float *weights = state->weights + head * BLOCK;
    const int padded = (num_keys + LANES - 1) / LANES * LANES;
    for (int j = num_keys; j < padded; j++) weights[j] = -INFINITY;
    Floats peaks = splat(state->highest[head]), total = {0};
    for (int j = 0; j < padded; j += LANES) peaks = larger(load(weights + j), peaks);
    const float peak = largest(peaks);
    for (int j = 0; j < padded; j += LANES) {
        const Floats weight = exp_negative(load(weights + j) - peak);
        store(weights + j, weight);
        total += weight;
    }
    if (peak > state->highest[head]) rescale(state, head, peak, row);
    state->total[head] += sum(total);
}

/* Adds the weighted V rows of a block, as many units wide as there are registers for. */
INLINE void mix(float *mixed, const float *weights, const char *value, int num_keys, int at, int64_t ahead,
                const Row row, const int units, const int elements, const int heads) {
    Pair strips[ACCUMULATORS / 2];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int u = 0; u < units; u++)
            strips[h * units + u] = load_pair((const char *)(mixed + h * row.padded + at + u * UNIT), UNIT, 0);
    for (int j = 0; j < num_keys; j++)
        UNROLL for (int u = 0; u < units; u++) {
            const char *from = value + j * row.bytes + (at + u * UNIT) * (row.is_bf16 ? 2 : 4);
            const Pair part = load_and_ask_ahead(from, ahead, elements, row.is_bf16);
            UNROLL for (int h = 0; h < heads; h++) {
                strips[h * units + u].first += part.first * weights[h * BLOCK + j];
                strips[h * units + u].second += part.second * weights[h * BLOCK + j];
            }
        }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int u = 0; u < units; u++)
            store_pair((char *)(mixed + h * row.padded + at + u * UNIT), strips[h * units + u], UNIT, 0);
}

INLINE void mix_block(float *mixed, const float *weights, const char *value, int num_keys, int64_t ahead, const Row row,
                      const int heads) {
    const int most = ACCUMULATORS / 2 / heads;
    int at = 0;
    for (; most >= 4 && at + 4 * UNIT <= row.dim; at += 4 * UNIT)
        mix(mixed, weights, value, num_keys, at, ahead, row, 4, UNIT, heads);
    for (; most >= 2 && at + 2 * UNIT <= row.dim; at += 2 * UNIT)
        mix(mixed, weights, value, num_keys, at, ahead, row, 2, UNIT, heads);
    for (; at + UNIT <= row.dim; at += UNIT) mix(mixed, weights, value, num_keys, at, ahead, row, 1, UNIT, heads);
    if (at < row.dim) mix(mixed, weights, value, num_keys, at, ahead, row, 1, UNIT / 2, heads);
}

/* Query heads handled together: those of a group are taken four, two or one at a time. */
INLINE int together(int heads_left) { return heads_left >= 4 ? 4 : heads_left >= 2 ? 2 : 1; }

INLINE void attend_block(State *state, const char *key, const char *value, int num_keys, int heads, const Row row) {
    const int64_t to_value = value - key, to_next_key = BLOCK * row.bytes - to_value;
    for (int h = 0; h < heads; h += together(heads - h)) {
        float *logits = state->weights + h * BLOCK;
        const float *query = state->query + h * row.padded;
        switch (together(heads - h)) {
        case 4: dot_block(logits, query, key, num_keys, to_value, row, 4); break;
        case 2: dot_block(logits, query, key, num_keys, to_value, row, 2); break;
        default: dot_block(logits, query, key, num_keys, to_value, row, 1);
        }
    }
    for (int h = 0; h < heads; h++) exponentials(state, h, num_keys, row);
    for (int h = 0; h < heads; h += together(heads - h)) {
        const float *weights = state->weights + h * BLOCK;
        float *mixed = state->mixed + h * row.padded;
        switch (together(heads - h)) {
        case 4: mix_block(mixed, weights, value, num_keys, to_next_key, row, 4); break;
        case 2: mix_block(mixed, weights, value, num_keys, to_next_key, row, 2); break;
        default: mix_block(mixed, weights, value, num_keys, to_next_key, row, 1);
        }
    }
}

INLINE void begin(State *state, const char *query, int heads, float scaling, const Row row) {
    for (int h = 0; h < heads; h++, query += row.bytes) {
        for (int at = 0; at < row.dim; at += UNIT) {
            const char *from = query + at * (row.is_bf16 ? 2 : 4);
            Pair part = at + UNIT <= row.dim ? load_pair(from, UNIT, row.is_bf16)
                                             : load_pair(from, UNIT / 2, row.is_bf16);
            part.first *= scaling, part.second *= scaling;
            store_pair((char *)(state->query + h * row.padded + at), part, UNIT, 0);
            store_pair((char *)(state->mixed + h * row.padded + at), (Pair){{0}, {0}}, UNIT, 0);
        }
        state->highest[h] = -INFINITY;
        state->total[h] = 0;
    }
}

INLINE void finish(const State *state, char *out, int heads, const Row row) {
    for (int h = 0; h < heads; h++, out += row.bytes)
        for (int at = 0; at < row.dim; at += UNIT) {
            char *to = out + at * (row.is_bf16 ? 2 : 4);
            Pair part = load_pair((const char *)(state->mixed + h * row.padded + at), UNIT, 0);
            part.first /= state->total[h], part.second /= state->total[h];
            if (at + UNIT <= row.dim)
                store_pair(to, part, UNIT, row.is_bf16);
            else
                store_pair(to, part, UNIT / 2, row.is_bf16);
        }
}

/* Where the rows of a KV head lie: the first `shared` of them in one place, the others in another. */
typedef struct {
    const char *shared_key, *shared_value, *key, *value;
    int64_t shared, length;
} Slabs;

typedef struct {
    char key[BLOCK * MAX_ROW_BYTES], value[BLOCK * MAX_ROW_BYTES];
} __attribute__((aligned(64))) Seam;

/* Brings together a block of which a part is shared, so that it is computed as if it lay in one piece. */
static __attribute__((noinline)) void join(Seam *seam, const Slabs *slabs, int64_t first, int num_keys, int row_bytes) {
    const int64_t before = (slabs->shared - first) * row_bytes, after = num_keys * (int64_t)row_bytes - before;
    memcpy(seam->key, slabs->shared_key + first * row_bytes, before);
    memcpy(seam->key + before, slabs->key, after);
    memcpy(seam->value, slabs->shared_value + first * row_bytes, before);
    memcpy(seam->value + before, slabs->value, after);
}

INLINE void attend(const Step *step, int64_t at, int heads, const Slabs *slabs, Seam *seam, const Row row) {
    State state;
    begin(&state, (const char *)step->query + at * row.bytes, heads, step->scaling, row);
    for (int64_t first = 0; first < slabs->length; first += BLOCK) {
        const int num_keys = slabs->length - first < BLOCK ? (int)(slabs->length - first) : BLOCK;
        const char *key = slabs->key + (first - slabs->shared) * row.bytes;
        const char *value = slabs->value + (first - slabs->shared) * row.bytes;
        if (first + num_keys <= slabs->shared) {
            key = slabs->shared_key + first * row.bytes, value = slabs->shared_value + first * row.bytes;
        } else if (first < slabs->shared) {
            join(seam, slabs, first, num_keys, row.bytes);
            key = seam->key, value = seam->value;
        }
        attend_block(&state, key, value, num_keys, heads, row);
    }
    finish(&state, (char *)step->out + at * row.bytes, heads, row);
}

INLINE void append_and_attend(const Step *step, int64_t index, Seam *seam, const Row row) {
    const int size = row.is_bf16 ? 2 : 4;
    char *key = (char *)step->pool + step->key_at[index] * size;
    char *value = (char *)step->pool + step->value_at[index] * size;
    Slabs slabs = {.key = key, .value = value, .length = step->lengths[index]};
    if (step->shared_lengths) {
        slabs.shared = step->shared_lengths[index];
        slabs.shared_key = (const char *)step->pool + step->shared_key_at[index] * size;
        slabs.shared_value = (const char *)step->pool + step->shared_value_at[index] * size;
    }
    const int64_t last = (slabs.length - slabs.shared - 1) * row.bytes;
    memcpy(key + last, (const char *)step->key + index * row.bytes, row.bytes);
    memcpy(value + last, (const char *)step->value + index * row.bytes, row.bytes);
    for (int64_t done = 0; done < step->group; done += GROUP) {
        const int heads = step->group - done < GROUP ? (int)(step->group - done) : GROUP;
        attend(step, index * step->group + done, heads, &slabs, seam, row);
    }
}

/* Threads take ever shorter runs of rows, for ragged lengths make equal shares unequal work; yet not single rows from
 * the start, for what one core has just written reaches another only after a while. Returns the run's first row. */
INLINE int64_t take(Step *step, int64_t *count) {
    const int64_t left = step->rows - atomic_load(&step->next);
    *count = left / (4 * step->threads) + 1;
    return atomic_fetch_add(&step->next, *count);
}

INLINE void work(Step *step, const int is_bf16) {
    const int dim = (int)step->head_dim;
    const Row row = {dim, dim * (is_bf16 ? 2 : 4), (dim + UNIT - 1) / UNIT * UNIT, is_bf16};
    Seam seam;
    int64_t count;
    for (int64_t first; (first = take(step, &count)) < step->rows;)
        for (int64_t index = first; index < first + count && index < step->rows; index++)
            append_and_attend(step, index, &seam, row);
}

void WORK(void *data) {
    Step *step = data;
    if (step->is_bf16)
        work(step, 1);
    else
        work(step, 0);
}
