/* Rotary embedding, KV cache update and causal attention for the new tokens of many sequences in one call.

   The row of each query head is computed independently: scores are summed over the head dimension in a fixed order, and keys are
   processed in chunks that start at multiples of 64 of the sequence, whatever else is in the call. So a token's result is bitwise
   identical alone, in a prompt or in a batch. The order of the sums: `attention_products.h`. A layer with a window reads only the chunks
   in which a new token sees something. */
#include "attention_cache.h"
#include "attention_products.h"
#include "kernels.h"

enum { TILE = 64, CONVERTED_ROWS = 16 };

/* How the scores of a chunk become weights. */
typedef struct {
    int has_scales;                                /* of tokens: of an int8 cache */
    float scale, softcap;
    float keys[CHUNK] __attribute__((aligned(64))); /* factors of the scores of each token, `scale` included */
    float values[CHUNK] __attribute__((aligned(64)));
} Weighing;

/* Where the blocks of a chunk of which `count` tokens are there begin; blocks behind the last token are replaced by the first. */
static void find_blocks(const Call *c, const Span *s, size_t head, size_t chunk, size_t count, const char **keys, const char **values, Weighing *w) {
    size_t bytes = c->head_dim * (is_int8(c) ? 1 : item_bytes(c->dtype));
    for (size_t b = 0; b < BLOCKS; b++) {
        size_t position = chunk + (b * BLOCK < count ? b * BLOCK : 0);
        size_t key = find_place(c, s, position, 0, head), value = find_place(c, s, position, 1, head);
        keys[b] = c->cache + key * bytes;
        values[b] = c->cache + value * bytes;
        if (w && w->has_scales) {
            store(w->keys + b * BLOCK, multiply(load_near(c->token_scales + key), spread(w->scale)));
            store(w->values + b * BLOCK, load_near(c->token_scales + value));
        }
    }
}

/* Convert a chunk to float32 blocks, values zero-padded to `padded` elements. */
static void convert_chunk(Chunk *chunk, int kind, size_t padded, float *keys, float *values) {
    size_t head_dim = chunk->head_dim, in_pairs = kind == BFLOAT16;
    for (size_t b = 0; b < BLOCKS; b++) {
        const char *from = chunk->keys[b], *beside = chunk->values[b];
        float *to = keys + b * BLOCK * head_dim, *to_values = values + b * BLOCK * padded;
        for (size_t i = 0; i < head_dim; i++) {
            size_t at = (in_pairs ? i / 2 * 2 : i) * BLOCK;
            floats key = in_pairs         ? (i % 2 ? load_seconds((const uint16_t *)from + at) : load_firsts((const uint16_t *)from + at))
                         : kind == INT8   ? load_bytes((const int8_t *)from + at, 16)
                                          : load_floats(from, kind, at, 16);
            store(to + i * BLOCK, key);
        }
        for (size_t row = 0; row < BLOCK; row++)
            for (size_t i = 0; i < padded; i += 16) {
                size_t count = lanes(i, head_dim), at = in_pairs ? (row / 2 * head_dim + i) * 2 : row * head_dim + i;
                const uint16_t *both = (const uint16_t *)beside + at;
                uint16_t part[32] = {0};
                if (in_pairs && count < 16) both = memcpy(part, both, count * 4);
                floats value = in_pairs       ? (row % 2 ? load_seconds(both) : load_firsts(both))
                               : kind == INT8 ? load_bytes((const int8_t *)beside + at, count)
                                              : load_floats(beside, kind, at, count);
                store(to_values + row * padded + i, value);
            }
        chunk->keys[b] = (const char *)to;
        chunk->values[b] = (const char *)to_values;
    }
    chunk->stride = padded;
}

/* tanh within 2 ulp, NaN is preserved: a polynomial near 0 (Cephes), else from exp. */
static floats tanh_floats(floats x) {
    const floats one = spread(1.0f);
    floats small = maximum(spread(-1.0f), minimum(one, x)), square = multiply(small, small), p = spread(-5.70498872745e-3f);
    p = fused(p, square, spread(2.06390887954e-2f));
    p = fused(p, square, spread(-5.37397155531e-2f));
    p = fused(p, square, spread(1.33314422036e-1f));
    p = fused(p, square, spread(-3.33332819422e-1f));
    floats near = fused(multiply(p, square), small, small), size = absolute(x);
    floats far = subtract(one, divide(spread(2.0f), add(exp_floats(add(size, size)), one)));
    floats is_negative = subtract(one, zero_below(x, 0.0f, one));
    far = subtract(far, multiply(add(far, far), is_negative));
    return add(zero_below(size, 0.625f, far), subtract(near, zero_below(size, 0.625f, near)));
}

/* Convert scores to weights relative to the largest score so far, of tokens [from, to) of the chunk; return the factor for the previous
   sums. `pairs`: where weights go that are rounded to bfloat16; else they replace the scores. */
static float weigh_row(const Weighing *w, float *scores, uint16_t *pairs, size_t from, size_t to, float *most, floats *sum) {
    floats score[BLOCKS], most_here = spread(-INFINITY), scale = spread(w->scale);
    for (size_t b = 0; b < BLOCKS; b++) {
        score[b] = multiply(load(scores + BLOCK * b), w->has_scales ? load(w->keys + BLOCK * b) : scale);
        if (w->softcap != 0) score[b] = multiply(spread(w->softcap), tanh_floats(divide(score[b], spread(w->softcap))));
    }
    if (from > 0 || to < CHUNK) {
        for (size_t b = 0; b < BLOCKS; b++) store(scores + BLOCK * b, score[b]);
        for (size_t token = 0; token < from; token++) scores[token] = -INFINITY;
        for (size_t b = 0; b < BLOCKS; b++)
            score[b] = load_part(scores + BLOCK * b, to <= BLOCK * b ? 0 : to - BLOCK * b, spread(-INFINITY));
    }
    for (size_t b = 0; b < BLOCKS; b++) most_here = maximum(most_here, score[b]);
    float before = *most, now = largest(most_here), factor = 1;
    if (before > now) now = before;
    if (!(now <= before)) {
        float factors[16] __attribute__((aligned(64)));
        store(factors, exp_floats(spread(before - now)));
        factor = factors[0];
    }
    *most = now;
    for (size_t b = 0; b < BLOCKS; b++) {
        score[b] = exp_floats(subtract(score[b], spread(now)));
#ifdef HAS_PAIRS
        if (pairs) {
            score[b] = store_pairs(pairs + BLOCK * b, score[b]);
            continue;
        }
#endif
        store(scores + BLOCK * b, w->has_scales ? multiply(score[b], load(w->values + BLOCK * b)) : score[b]);
    }
    floats here = add(add(score[0], score[1]), add(score[2], score[3]));
    *sum = add(multiply(*sum, spread(factor)), here);
    return factor;
}

/* Up to TOGETHER rows, each of which sees tokens [from, to) of the chunk: those that all see together, those before and behind row by row. */
static void add_seen(const void *weights, size_t weight_bytes, const Chunk *chunk, int kind, int rows, int valid, const size_t *from,
                     const size_t *to, float *factors, float *out, size_t stride) {
    size_t low = from[0], high = to[0], alike = 1;
    for (int r = 1; r < valid; r++) {
        alike &= from[r] == from[0] && to[r] == to[0];
        if (from[r] > low) low = from[r];
        if (to[r] < high) high = to[r];
    }
    if (!alike && kind == PAIRS) low = (low + 1) / 2 * 2, high = high / 2 * 2; /* all rows see both halves */
    if (rows == 1 || low >= high) low = high = 0;
#define ALONE(begin, end) add_values((const char *)weights + r * CHUNK * weight_bytes, chunk, kind, 1, begin, end, factors + r, out + r * stride, stride), factors[r] = 1
    for (int r = 0; r < valid; r++)
        if (from[r] < low) ALONE(from[r], low);
    if (low < high) add_values(weights, chunk, kind, TOGETHER, low, high, factors, out, stride);
    for (int r = 0; r < valid; r++) {
        if (low < high) factors[r] = 1;
        if (from[r] < to[r] && to[r] > high) ALONE(from[r] > high ? from[r] : high, to[r]);
    }
#undef ALONE
}

static _Thread_local void *kept;
static _Thread_local size_t kept_bytes;

/* Process rows [first, first + count) of the (token, query head) pairs of one KV head. Returns 1 when out of memory. */
static int attend_tile(const Call *c, const Span *s, size_t kv_head, size_t first, size_t count) {
    size_t group = c->heads / c->kv_heads, padded = (c->head_dim + 15) / 16 * 16;
    size_t together = count == 1 ? 1 : TOGETHER, rows = (count + together - 1) / together * together;
    int kind = is_int8(c) ? INT8 : c->dtype;
#ifdef HAS_PAIRS
    if (kind == BFLOAT16) kind = PAIRS;
#endif
    int converts = kind != PAIRS && (padded != c->head_dim || (kind != FLOAT32 && rows > CONVERTED_ROWS));
    float *memory = keep_bytes(&kept, &kept_bytes, 4 * (2 * TILE * padded + 2 * CHUNK * padded + 2 * TOGETHER * CHUNK + 32 * TILE));
    if (!memory) return 1;
    float *query = memory, *out = query + TILE * padded, *keys = out + TILE * padded, *values = keys + CHUNK * padded;
    float *scores = values + CHUNK * padded, *most = scores + 2 * TOGETHER * CHUNK;
    uint16_t *pairs = kind == PAIRS ? (uint16_t *)(scores + TOGETHER * CHUNK) : NULL;
    const void *weights = pairs ? (void *)pairs : (void *)scores;
    size_t query_bytes = padded * (pairs ? 2 : 4), weight_bytes = pairs ? 2 : 4;
    floats *sums = (floats *)(most + TILE);
    const float *fixed = c->fixed_scales ? c->fixed_scales + kv_head * c->head_dim : NULL;
    for (size_t r = 0; r < rows; r++) {
        size_t pair = first + r, at = ((s->first + pair / group) * (c->heads + 2 * c->kv_heads) + kv_head * group + pair % group) * c->head_dim;
        for (size_t i = 0; i < padded; i += 16) {
            size_t there = lanes(i, c->head_dim);
            floats value = r < count ? load_floats(c->rows, c->dtype, at + i, there) : spread(0.0f);
            if (fixed) value = multiply(value, load_part(fixed + i, there, spread(0.0f)));
            store_floats(query, pairs ? BFLOAT16 : FLOAT32, r * padded + i, value, 16);
            store(out + r * padded + i, spread(0.0f));
        }
        most[r] = -INFINITY;
        sums[r] = spread(0.0f);
    }
    size_t lowest = s->before + first / group, last = s->before + (first + count - 1) / group;
    size_t begin = c->window && lowest >= c->window ? (lowest + 1 - c->window) / CHUNK * CHUNK : 0;
    Weighing w = {.has_scales = c->token_scales != NULL, .scale = 1.0f / sqrtf((float)c->head_dim), .softcap = c->softcap};
    for (size_t chunk = begin; chunk <= last; chunk += CHUNK) {
        Chunk here = {.head_dim = c->head_dim, .stride = c->head_dim};
        find_blocks(c, s, kv_head, chunk, smaller(CHUNK, last + 1 - chunk), here.keys, here.values, &w);
        int is_last = chunk + CHUNK > last;
        if (converts) convert_chunk(&here, kind, padded, keys, values);
        if (converts || is_last) memcpy(here.next_keys, here.keys, sizeof here.keys), memcpy(here.next_values, here.values, sizeof here.values);
        else find_blocks(c, s, kv_head, chunk + CHUNK, smaller(CHUNK, last + 1 - chunk - CHUNK), here.next_keys, here.next_values, NULL);
        int now = converts ? CONVERTED : kind;
        for (size_t row = 0; row < rows; row += together) {
            float factors[TOGETHER] = {1, 1, 1, 1};
            size_t from[TOGETHER], to[TOGETHER], valid = smaller(together, count - row), seen = 0;
            for (size_t r = 0; r < valid; r++) {
                size_t position = s->before + (first + row + r) / group;
                size_t start = c->window && position >= c->window ? position + 1 - c->window : 0;
                from[r] = start <= chunk ? 0 : smaller(start - chunk, CHUNK);
                to[r] = position < chunk ? 0 : smaller(position + 1 - chunk, CHUNK);
                if (from[r] >= to[r]) from[r] = to[r] = 0;
                seen += to[r];
            }
            if (!seen) continue;
            score_rows((const char *)query + row * query_bytes, padded, &here, now, together, scores);
            for (size_t r = 0; r < valid; r++)
                if (to[r])
                    factors[r] = weigh_row(&w, scores + r * CHUNK, pairs ? pairs + r * CHUNK : NULL, from[r], to[r], most + row + r, sums + row + r);
            add_seen(weights, weight_bytes, &here, now, together, valid, from, to, factors, out + row * padded, padded);
            memcpy(here.next_keys, here.keys, sizeof here.keys), memcpy(here.next_values, here.values, sizeof here.values);
        }
    }
    for (size_t r = 0; r < count; r++) {
        size_t pair = first + r, at = ((s->first + pair / group) * c->heads + kv_head * group + pair % group) * c->head_dim;
        floats sum = spread(sum_floats(sums[r]));
        for (size_t i = 0; i < c->head_dim; i += 16) {
            size_t there = lanes(i, c->head_dim);
            floats value = divide(load(out + r * padded + i), sum);
            if (fixed) value = multiply(value, load_part(fixed + c->kv_heads * c->head_dim + i, there, spread(0.0f)));
            store_floats(c->out, c->dtype, at + i, value, there);
        }
    }
    return 0;
}

INLINE size_t count_tiles(const Call *c, const Span *s) { return (s->count * (c->heads / c->kv_heads) + TILE - 1) / TILE; }

/* Rotate queries and keys of `rows` in place, append keys and values to their sequences' caches, and attend. Arguments: see Call.
   Returns 0, or 1 when out of memory. */
int tandem_attend(void *rows, int dtype, size_t tokens, size_t heads, size_t kv_heads, size_t head_dim, const float *cosine, const float *sine,
                  void *cache, float *token_scales, const float *fixed_scales, size_t block_size, const int64_t *spans, size_t num_spans,
                  const int64_t *blocks, size_t window, float softcap, void *out, int threads) {
    Call call = {rows, dtype, tokens, heads, kv_heads, head_dim, cosine, sine, cache, token_scales, fixed_scales, block_size, spans, num_spans,
                 blocks, window, softcap, out};
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
