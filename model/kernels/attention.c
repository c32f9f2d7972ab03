/* Rotary embedding, KV cache update and causal attention for the new tokens of many sequences in one call.

   The row of each query head is computed independently: scores are summed over the head dimension in a fixed order, and keys are
   processed in chunks that start at multiples of 64 of the sequence, whatever else is in the call. So a token's result is bitwise
   identical alone, in a prompt or in a batch. */
#include "kernels.h"
#include "vectors.h"

enum { CHUNK = 64, TILE = 64, TOGETHER = 4 };

typedef struct {
    char *rows;             /* [tokens][heads + 2 kv_heads][head_dim]: query, keys, values */
    int dtype;
    size_t tokens, heads, kv_heads, head_dim;
    const float *cosine, *sine; /* [tokens][head_dim]; the sine is signed */
    char *cache;            /* [blocks][2][kv_heads][block_size][head_dim] of one layer */
    float *token_scales;    /* [blocks][2][kv_heads][block_size], or NULL */
    const float *fixed_scales; /* [2][kv_heads][head_dim], or NULL; an int8 cache has one of the two */
    size_t block_size;
    const int64_t *spans;   /* [num_spans][3]: first token, earlier tokens of the sequence, index of its first block in `blocks` */
    size_t num_spans;
    const int64_t *blocks;
    char *out;              /* [tokens][heads * head_dim] */
} Call;

typedef struct {
    size_t first, count, before;
    const int64_t *blocks;
} Span;

INLINE Span find_span(const Call *c, size_t index) {
    const int64_t *span = c->spans + 3 * index;
    size_t stop = index + 1 < c->num_spans ? (size_t)span[3] : c->tokens;
    return (Span){span[0], stop - span[0], span[1], c->blocks + span[2]};
}

/* Position of a token of a sequence, in elements / head_dim: its row of the cache and its index in token_scales. */
INLINE size_t find_place(const Call *c, const Span *s, size_t position, size_t side, size_t head) {
    return ((s->blocks[position / c->block_size] * 2 + side) * c->kv_heads + head) * c->block_size + position % c->block_size;
}

INLINE int is_int8(const Call *c) { return c->token_scales || c->fixed_scales; }

static void rotate_row(const Call *c, size_t token, size_t at) {
    size_t half = c->head_dim / 2;
    const float *cosine = c->cosine + token * c->head_dim, *sine = c->sine + token * c->head_dim;
    const floats none = spread(0.0f);
    for (size_t i = 0; i < half; i += 16) {
        size_t count = lanes(i, half);
        floats low = load_floats(c->rows, c->dtype, at + i, count), high = load_floats(c->rows, c->dtype, at + half + i, count);
        floats low_cosine = load_part(cosine + i, count, none), high_cosine = load_part(cosine + half + i, count, none);
        floats low_sine = load_part(sine + i, count, none), high_sine = load_part(sine + half + i, count, none);
        floats turned = add(multiply(low, low_cosine), multiply(high, low_sine));
        store_floats(c->rows, c->dtype, at + i, turned, count);
        turned = add(multiply(high, high_cosine), multiply(low, high_sine));
        store_floats(c->rows, c->dtype, at + half + i, turned, count);
    }
}

/* Write one token's key or value of one head to the cache; in int8 it is rounded to multiples of a scale. */
static void keep_row(const Call *c, const Span *s, size_t position, size_t side, size_t head, size_t at) {
    size_t place = find_place(c, s, position, side, head), to = place * c->head_dim;
    floats scale = spread(0.0f);
    if (c->token_scales) {
        floats most = spread(0.0f); /* compares the bits of absolute values, so that NaN is the largest */
        for (size_t i = 0; i < c->head_dim; i += 16) {
            most = maximum_bits(most, absolute(load_floats(c->rows, c->dtype, at + i, lanes(i, c->head_dim))));
        }
        float step = largest_bits(most) / 127.0f;
        c->token_scales[place] = step < 1e-30f ? 1e-30f : step;
        scale = spread(c->token_scales[place]);
    }
    for (size_t i = 0; i < c->head_dim; i += 16) {
        size_t count = lanes(i, c->head_dim);
        floats value = load_floats(c->rows, c->dtype, at + i, count);
        if (!is_int8(c)) {
            store_floats(c->cache, c->dtype, to + i, value, count);
            continue;
        }
        if (c->fixed_scales) scale = load_part(c->fixed_scales + (side * c->kv_heads + head) * c->head_dim + i, count, spread(1.0f));
        /* Clamp before converting: values outside the 32-bit range would all become INT_MIN. */
        floats steps = divide(value, scale);
        steps = minimum(spread(127.0f), maximum(spread(-128.0f), steps));
        store_bytes((int8_t *)c->cache + to + i, to_ints(steps), count);
    }
}

INLINE floats read_cache(const Call *c, size_t place, size_t side, size_t head, size_t i, size_t count) {
    if (!is_int8(c)) return load_floats(c->cache, c->dtype, place * c->head_dim + i, count);
    floats value = load_bytes((const int8_t *)c->cache + place * c->head_dim + i, count);
    if (c->token_scales) return multiply(value, spread(c->token_scales[place]));
    return multiply(value, load_part(c->fixed_scales + (side * c->kv_heads + head) * c->head_dim + i, count, spread(0.0f)));
}

/* Load keys [head_dim][CHUNK] and values [CHUNK][padded head_dim] of a chunk as float32, zero-padded. */
static void read_chunk(const Call *c, const Span *s, size_t head, size_t chunk, size_t count, float *keys, float *values, size_t padded) {
    for (size_t key = 0; key < CHUNK; key += 16) {
        size_t valid = key < count ? smaller(16, count - key) : 0;
        size_t places[2] = {valid ? find_place(c, s, chunk + key, 0, head) : 0, valid ? find_place(c, s, chunk + key, 1, head) : 0};
        for (size_t i = 0; i < padded; i += 16) {
            size_t there = lanes(i, c->head_dim);
            floats row[16];
            for (size_t k = 0; k < 16; k++) {
                row[k] = k < valid ? read_cache(c, places[0] + k, 0, head, i, there) : spread(0.0f);
                floats value = k < valid ? read_cache(c, places[1] + k, 1, head, i, there) : spread(0.0f);
                store(values + (key + k) * padded + i, value);
            }
            transpose(row);
            for (size_t k = 0; k < 16; k++) store(keys + (i + k) * CHUNK + key, row[k]);
        }
    }
}

static void score_rows(const float *query, const float *keys, size_t head_dim, size_t padded, float *scores) {
    for (int first = 0; first < 4; first += KEYS_AT_ONCE) {
        floats acc[TOGETHER][KEYS_AT_ONCE];
#pragma GCC unroll 4
        for (int r = 0; r < TOGETHER; r++)
#pragma GCC unroll 4
            for (int k = 0; k < KEYS_AT_ONCE; k++) acc[r][k] = spread(0.0f);
        for (size_t i = 0; i < head_dim; i++) {
            floats key[KEYS_AT_ONCE];
#pragma GCC unroll 4
            for (int k = 0; k < KEYS_AT_ONCE; k++) key[k] = load(keys + i * CHUNK + 16 * (first + k));
#pragma GCC unroll 4
            for (int r = 0; r < TOGETHER; r++) {
                floats one = spread(query[r * padded + i]);
#pragma GCC unroll 4
                for (int k = 0; k < KEYS_AT_ONCE; k++) acc[r][k] = fused(one, key[k], acc[r][k]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < TOGETHER; r++)
#pragma GCC unroll 4
            for (int k = 0; k < KEYS_AT_ONCE; k++) store(scores + r * CHUNK + 16 * (first + k), acc[r][k]);
    }
}

/* Convert scores to weights relative to the largest score so far; return the factor for the previous sums. */
static float weigh_row(float *scores, size_t visible, float *most, floats *sum) {
    floats score[4], most_here = spread(-INFINITY);
    for (int k = 0; k < 4; k++) {
        size_t seen = visible <= 16u * k ? 0 : visible - 16u * k;
        score[k] = load_part(scores + 16 * k, seen, spread(-INFINITY));
        most_here = maximum(most_here, score[k]);
    }
    float before = *most, now = largest(most_here);
    if (before > now) now = before;
    *most = now;
    for (int k = 0; k < 4; k++) {
        score[k] = exp_floats(subtract(score[k], spread(now)));
        store(scores + 16 * k, score[k]);
    }
    float factors[16] __attribute__((aligned(64)));
    store(factors, exp_floats(spread(before - now)));
    float factor = factors[0];
    floats here = add(add(score[0], score[1]), add(score[2], score[3]));
    *sum = add(multiply(*sum, spread(factor)), here);
    return factor;
}

/* Each row attends to the keys visible to it; the first row has the fewest. Later keys are skipped, not weighted with zero: an infinity
   there would become NaN. */
INLINE void add_values(const float *weights, const float *values, const size_t *visible, size_t padded, size_t first, const int width,
                       const float *factors, float *out) {
    floats acc[TOGETHER][KEYS_AT_ONCE];
#pragma GCC unroll 4
    for (int r = 0; r < TOGETHER; r++)
#pragma GCC unroll 4
        for (int k = 0; k < width; k++)
            acc[r][k] = multiply(load(out + r * padded + first + 16 * k), spread(factors[r]));
    for (size_t key = 0; key < visible[0]; key++) {
        floats value[KEYS_AT_ONCE];
#pragma GCC unroll 4
        for (int k = 0; k < width; k++) value[k] = load(values + key * padded + first + 16 * k);
#pragma GCC unroll 4
        for (int r = 0; r < TOGETHER; r++) {
            floats weight = spread(weights[r * CHUNK + key]);
#pragma GCC unroll 4
            for (int k = 0; k < width; k++) acc[r][k] = fused(weight, value[k], acc[r][k]);
        }
    }
#pragma GCC unroll 4
    for (int r = 1; r < TOGETHER; r++)
        for (size_t key = visible[0]; key < visible[r]; key++)
#pragma GCC unroll 4
            for (int k = 0; k < width; k++) {
                floats value = load(values + key * padded + first + 16 * k);
                acc[r][k] = fused(spread(weights[r * CHUNK + key]), value, acc[r][k]);
            }
#pragma GCC unroll 4
    for (int r = 0; r < TOGETHER; r++)
#pragma GCC unroll 4
        for (int k = 0; k < width; k++) store(out + r * padded + first + 16 * k, acc[r][k]);
}

static _Thread_local void *kept;
static _Thread_local size_t kept_bytes;

/* Process rows [first, first + count) of the (token, query head) pairs of one KV head. Returns 1 when out of memory. */
static int attend_tile(const Call *c, const Span *s, size_t kv_head, size_t first, size_t count) {
    size_t group = c->heads / c->kv_heads, padded = (c->head_dim + 15) / 16 * 16, rows = (count + TOGETHER - 1) / TOGETHER * TOGETHER;
    float *memory = keep_bytes(&kept, &kept_bytes, 4 * (2 * TILE * padded + 2 * CHUNK * padded + TILE * CHUNK + 32 * TILE));
    if (!memory) return 1;
    float *query = memory, *out = query + TILE * padded, *keys = out + TILE * padded, *values = keys + CHUNK * padded;
    float *scores = values + CHUNK * padded, *most = scores + TILE * CHUNK;
    floats *sums = (floats *)(most + TILE);
    floats scale = spread(1.0f / sqrtf((float)c->head_dim));
    for (size_t r = 0; r < rows; r++) {
        size_t pair = first + r, at = ((s->first + pair / group) * (c->heads + 2 * c->kv_heads) + kv_head * group + pair % group) * c->head_dim;
        for (size_t i = 0; i < padded; i += 16) {
            floats value = r < count ? load_floats(c->rows, c->dtype, at + i, lanes(i, c->head_dim)) : spread(0.0f);
            store(query + r * padded + i, multiply(value, scale));
            store(out + r * padded + i, spread(0.0f));
        }
        most[r] = -INFINITY;
        sums[r] = spread(0.0f);
    }
    size_t last = s->before + (first + count - 1) / group;
    for (size_t chunk = 0; chunk <= last; chunk += CHUNK) {
        size_t there = smaller(CHUNK, last + 1 - chunk);
        read_chunk(c, s, kv_head, chunk, there, keys, values, padded);
        for (size_t row = 0; row < rows; row += TOGETHER) {
            float factors[TOGETHER];
            size_t visible[TOGETHER], lowest = s->before + (first + row) / group;
            size_t highest = s->before + (first + smaller(row + TOGETHER, count) - 1) / group;
            if (highest < chunk) continue;
            score_rows(query + row * padded, keys, c->head_dim, padded, scores + row * CHUNK);
            for (size_t r = row; r < row + TOGETHER; r++) {
                size_t position = r < count ? s->before + (first + r) / group : lowest;
                visible[r - row] = position < chunk ? 0 : smaller(position + 1 - chunk, CHUNK);
                factors[r - row] = weigh_row(scores + r * CHUNK, visible[r - row], most + r, sums + r);
            }
            for (size_t i = 0; i < padded; i += 16 * KEYS_AT_ONCE) {
                const float *weights = scores + row * CHUNK;
                float *to = out + row * padded;
                switch (smaller(KEYS_AT_ONCE, (padded - i) / 16)) {
                    case 1: add_values(weights, values, visible, padded, i, 1, factors, to); break;
#if KEYS_AT_ONCE > 1
                    case 2: add_values(weights, values, visible, padded, i, 2, factors, to); break;
                    case 3: add_values(weights, values, visible, padded, i, 3, factors, to); break;
                    case 4: add_values(weights, values, visible, padded, i, 4, factors, to); break;
#endif
                }
            }
        }
    }
    for (size_t r = 0; r < count; r++) {
        size_t pair = first + r, at = ((s->first + pair / group) * c->heads + kv_head * group + pair % group) * c->head_dim;
        floats sum = spread(sum_floats(sums[r]));
        for (size_t i = 0; i < c->head_dim; i += 16)
            store_floats(c->out, c->dtype, at + i, divide(load(out + r * padded + i), sum), lanes(i, c->head_dim));
    }
    return 0;
}

INLINE size_t count_tiles(const Call *c, const Span *s) { return (s->count * (c->heads / c->kv_heads) + TILE - 1) / TILE; }

/* Rotate queries and keys of `rows` in place, append keys and values to their sequences' caches, and attend. Arguments: see Call.
   Returns 0, or 1 when out of memory. */
int tandem_attend(void *rows, int dtype, size_t tokens, size_t heads, size_t kv_heads, size_t head_dim, const float *cosine, const float *sine,
                  void *cache, float *token_scales, const float *fixed_scales, size_t block_size, const int64_t *spans, size_t num_spans,
                  const int64_t *blocks, void *out, int threads) {
    Call call = {rows, dtype, tokens, heads, kv_heads, head_dim, cosine, sine, cache, token_scales, fixed_scales, block_size, spans, num_spans,
                 blocks, out};
    const Call *c = &call;
    size_t tasks = 0, all_heads = heads + 2 * kv_heads;
    int failed = 0;
    for (size_t index = 0; index < num_spans; index++) {
        Span s = find_span(c, index);
        tasks += count_tiles(c, &s) * kv_heads;
#pragma omp parallel for num_threads(threads) if (threads > 1 && s.count > 4)
        for (size_t token = s.first; token < s.first + s.count; token++) {
            for (size_t head = 0; head < heads + kv_heads; head++) rotate_row(c, token, (token * all_heads + head) * head_dim);
            size_t position = s.before + token - s.first;
            for (size_t head = 0; head < 2 * kv_heads; head++)
                keep_row(c, &s, position, head / kv_heads, head % kv_heads, (token * all_heads + heads + head) * head_dim);
        }
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && tasks > 1) reduction(| : failed)
    for (size_t task = 0; task < tasks; task++) {
        size_t left = task, index = 0;
        Span s = find_span(c, 0);
        while (left >= count_tiles(c, &s) * kv_heads) {
            left -= count_tiles(c, &s) * kv_heads;
            s = find_span(c, ++index);
        }
        size_t first = left / kv_heads * TILE, pairs = s.count * (heads / kv_heads);
        failed |= attend_tile(c, &s, left % kv_heads, first, smaller(TILE, pairs - first));
    }
    return failed;
}
