/* Post-vision statistics, a block of attention rows at a time, by the tile products of AMX.
 *
 * Logits are computed transposed, S^T = K Q^T: a tile of keys, read where the model left them, times the queries. A
 * vector then holds what LANES rows give to one key, and nothing that is asked of a row needs a sum over lanes.
 */
#include "statistics_call.h"
#include "vectors.h"

#include <immintrin.h>

#define MAX_HEAD_DIM 256
#define DEPTH 32                     /* dimensions that one tile product takes */
#define VECTORS (BLOCK_ROWS / LANES) /* of rows */
/* As in the reference: a fainter entry is lost beside the maximum's 1, and its share would be a denormal. */
#define FAINTEST_LOGIT -60.0f

/* GCC's headers hide from the compiler that the tiles' instructions read memory: it could write too late or never. */
#define WRITE_ALL(to) __asm__ volatile("" ::"r"(to) : "memory")

typedef struct {
    uint32_t queries[MAX_HEAD_DIM / 2][BLOCK_ROWS]; /* pairs of dimensions, as tile products want them */
    int32_t positions[BLOCK_ROWS], counts[BLOCK_ROWS];
    float normalisers[BLOCK_ROWS], masses[2][BLOCK_ROWS];
    char last_keys[TILE_KEYS * MAX_HEAD_DIM * 2]; /* where fewer than a tile are left; behind them anything */
    int64_t head, first;                          /* KV head, first of its rows, query head after query head */
    int rows, vectors;
    Floats *weights; /* [VECTORS, padded_keys]: logits, then exp(S - rowmax(S)) */
} __attribute__((aligned(64))) Block;

/* Tiles 0 to 3 hold logits, 4 keys and 5 to 7 queries, in 16 rows of 64 bytes each. */
static void configure_tiles(void) {
    struct {
        uint8_t palette, reserved[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        tiles.row_bytes[tile] = 64;
        tiles.rows[tile] = 16;
    }
    WRITE_ALL(&tiles);
    _tile_loadconfig(&tiles);
}

static void begin(const Call *call, int64_t index, Block *block) {
    const int64_t head_rows = call->group * call->rows;
    block->head = index / call->blocks;
    block->first = index % call->blocks * BLOCK_ROWS;
    block->rows = head_rows - block->first < BLOCK_ROWS ? (int)(head_rows - block->first) : BLOCK_ROWS;
    block->vectors = (block->rows + LANES - 1) / LANES;
    for (int i = 0; i < BLOCK_ROWS; i++) {
        /* what is no row repeats the first one, and is left out in the end */
        const int64_t row = block->first + (i < block->rows ? i : 0);
        const int64_t head = block->head * call->group + row / call->rows;
        const char *query = call->query + head * call->query_head_bytes + row % call->rows * call->query_row_bytes;
        block->positions[i] = (int32_t)(call->num_keys - call->rows + row % call->rows);
        for (int pair = 0; pair < call->head_dim / 2; pair++) memcpy(&block->queries[pair][i], query + 4 * pair, 4);
    }
}

/* Always four tiles of queries: the logits of rows that the block does not have are never read. */
INLINE void multiply(const Call *call, const Block *block, const char *keys, int64_t key_bytes, Floats *logits) {
    WRITE_ALL(block);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int at = 0; at < call->head_dim; at += DEPTH) {
        const uint32_t *queries = block->queries[at / 2];
        _tile_loadd(4, keys + 2 * at, key_bytes);
        _tile_loadd(5, queries, sizeof *block->queries);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, queries + LANES, sizeof *block->queries);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, queries + 2 * LANES, sizeof *block->queries);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, queries + 3 * LANES, sizeof *block->queries);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, logits, sizeof *logits);
    _tile_stored(1, logits + call->padded_keys, sizeof *logits);
    _tile_stored(2, logits + 2 * call->padded_keys, sizeof *logits);
    _tile_stored(3, logits + 3 * call->padded_keys, sizeof *logits);
}

static void multiply_all(const Call *call, Block *block) {
    const char *keys = call->key + block->head * call->key_head_bytes;
    const int64_t bytes = 2 * call->head_dim;
    int64_t key = 0;
    for (; key + TILE_KEYS <= call->num_keys; key += TILE_KEYS)
        multiply(call, block, keys + key * call->key_bytes, call->key_bytes, block->weights + key);
    if (key == call->num_keys) return;
    for (int64_t i = 0; key + i < call->num_keys; i++)
        memcpy(block->last_keys + i * bytes, keys + (key + i) * call->key_bytes, bytes);
    multiply(call, block, block->last_keys, bytes, block->weights + key);
}

/* Only the last keys may lie after a row, and padding lies after all. */
INLINE void hide_future(const Call *call, const int32_t *positions, Floats *logits) {
    Ints position;
    memcpy(&position, positions, sizeof position);
    for (int64_t key = call->num_keys - call->rows + 1; key < call->padded_keys; key++)
        logits[key] = choose((int32_t)key > position, splat(-INFINITY), logits[key]);
}

INLINE Floats peaks(const Call *call, const Floats *logits) {
    Floats found[4] = {logits[0], logits[1], logits[2], logits[3]}; /* four, or each would wait for the one before */
    for (int64_t key = 0; key < call->padded_keys; key += 4)
        UNROLL for (int i = 0; i < 4; i++) found[i] = larger(logits[key + i], found[i]);
    return larger(larger(found[0], found[1]), larger(found[2], found[3]));
}

/* Turns the logits of LANES rows into exponentials. */
static void weigh(const Call *call, Block *block, int vector) {
    Floats *weights = block->weights + vector * call->padded_keys, total = {0};
    hide_future(call, block->positions + vector * LANES, weights);
    const Floats peak = peaks(call, weights);
    Ints count = {0};
    for (int64_t tile = 0; tile < call->padded_keys; tile += TILE_KEYS) {
        Floats subtotal = {0}; /* thousands of fp32 in one sum would lose digits */
        for (int64_t key = tile; key < tile + TILE_KEYS; key++) {
            const Floats logit = (weights[key] - peak) * call->scaling;
            weights[key] = choose(logit < splat(FAINTEST_LOGIT), (Floats){0}, exp_negative(logit));
            subtotal += weights[key];
            count -= weights[key] >= splat(call->threshold);
        }
        total += subtotal;
    }
    store(block->normalisers + vector * LANES, 1 / total);
    memcpy(block->counts + vector * LANES, &count, sizeof count);
}

static void split_mass(const Call *call, Block *block, int vector) {
    const Floats *weights = block->weights + vector * call->padded_keys;
    const Floats normaliser = load(block->normalisers + vector * LANES);
    Floats masses[2] = {{0}};
    for (int64_t tile = 0; tile < call->num_keys; tile += TILE_KEYS) {
        Floats subtotals[2] = {{0}};
        for (int64_t key = tile; key < tile + TILE_KEYS && key < call->num_keys; key++)
            subtotals[!call->visual[key]] += weights[key];
        for (int part = 0; part < 2; part++) masses[part] += subtotals[part];
    }
    for (int part = 0; part < 2; part++) store(block->masses[part] + vector * LANES, masses[part] * normaliser);
}

/* What the block adds to the columns: one sum over lanes per key, whatever the number of rows. */
static void add_rows(const Call *call, Block *block, float *sum_of_rows) {
    for (int i = block->rows; i < BLOCK_ROWS; i++) block->normalisers[i] = 0;
    for (int64_t key = 0; key < call->padded_keys; key += LANES) {
        Floats shares[LANES] = {{0}};
        for (int vector = 0; vector < block->vectors; vector++) {
            const Floats *weights = block->weights + vector * call->padded_keys + key;
            const Floats normaliser = load(block->normalisers + vector * LANES);
            UNROLL for (int i = 0; i < LANES; i++) shares[i] += weights[i] * normaliser;
        }
        store(sum_of_rows + key, sums(shares));
    }
}

static void hand_out(const Call *call, const Block *block) {
    const int64_t head_rows = call->group * call->rows, at = block->head * head_rows + block->first;
    memcpy(call->counts + at, block->counts, block->rows * sizeof *block->counts);
    for (int part = 0; call->visual && part < 2; part++) {
        float *masses = call->masses + part * call->num_kv_heads * head_rows + at;
        memcpy(masses, block->masses[part], block->rows * sizeof *masses);
    }
}

/* The work of one thread. */
void statistics_rows(void *data) {
    Call *call = data;
    Block block;
    block.weights = (Floats *)call->weights + atomic_fetch_add(&call->next_thread, 1) * VECTORS * call->padded_keys;
    configure_tiles();
    for (int64_t index; (index = atomic_fetch_add(&call->next_block, 1)) < call->num_kv_heads * call->blocks;) {
        begin(call, index, &block);
        multiply_all(call, &block);
        for (int vector = 0; vector < block.vectors; vector++) {
            weigh(call, &block, vector);
            if (call->visual) split_mass(call, &block, vector);
        }
        add_rows(call, &block, call->parts + index * call->padded_keys);
        hand_out(call, &block);
    }
    _tile_release();
}

/* Afterwards, in the order of the blocks, whichever thread was sooner. */
void statistics_columns(const Call *call) {
    for (int64_t head = 0; head < call->num_kv_heads; head++)
        for (int64_t key = 0; key < call->num_keys; key += LANES) {
            const float *parts = call->parts + head * call->blocks * call->padded_keys + key;
            const int64_t left = call->num_keys - key;
            Floats total = {0};
            for (int64_t block = 0; block < call->blocks; block++) total += load(parts + block * call->padded_keys);
            memcpy(call->columns + head * call->num_keys + key, &total, (left < LANES ? left : LANES) * sizeof(float));
        }
}
