/* The products of attention: scores of queries with keys, and weighted sums of values, over a chunk of the KV cache.

   Keys and values are read as they lie in the cache, in blocks of 16 tokens (`BLOCK`), each of 16 * head_dim elements:

   - keys [head_dim][16], values [16][head_dim]: float32, float16 and int8;
   - keys [head_dim / 2][16][2], values [8][head_dim][2]: bfloat16, so that two dimensions of a key, or the same dimension of the values of
     two tokens, lie in a pair.

   Rows are pairs of a token and a query head, four at a time. The sums of a row are the same however many are computed together: a score
   adds the dimensions in order, a weighted sum the tokens in order, in pairs in the kind `PAIRS`. Weights of tokens that a row does not see are
   not multiplied with their values, since an infinity there would become NaN. */
#ifndef TANDEM_ATTENTION_PRODUCTS_H
#define TANDEM_ATTENTION_PRODUCTS_H

#include "vectors.h"

enum { CHUNK = 64, BLOCK = 16, BLOCKS = CHUNK / BLOCK, TOGETHER = 4 };

/* How a cache's elements are multiplied, beside the types: converted to float32, also before (float32 blocks that are in the CPU's cache
   already), or as pairs of bfloat16. */
enum { INT8 = 3, CONVERTED = 4, PAIRS = 5 };

typedef struct {
    const char *keys[BLOCKS], *values[BLOCKS];
    const char *next_keys[BLOCKS], *next_values[BLOCKS]; /* prefetched meanwhile */
    size_t head_dim;
    size_t stride; /* elements from a token's values to the next token's */
} Chunk;

INLINE size_t kind_bytes(const int kind) { return kind == INT8 ? 1 : kind == BFLOAT16 || kind == FLOAT16 ? 2 : 4; }

/* Whether element `at` begins a line of the cache, so that the same line of the next chunk is prefetched. */
INLINE int begins_line(const int kind, size_t at) { return kind != CONVERTED && at * kind_bytes(kind) % 64 == 0; }

/* 16 elements from `at` on; in bfloat16 the first or second ones of 16 pairs. */
INLINE floats read_lanes(const char *from, const int kind, size_t at, const int second) {
    if (kind == FLOAT32 || kind == CONVERTED) return load_near((const float *)from + at);
    if (kind == INT8) return load_bytes((const int8_t *)from + at, 16);
    if (kind == FLOAT16) return load_floats(from, FLOAT16, at, 16);
    return second ? load_seconds((const uint16_t *)from + at) : load_firsts((const uint16_t *)from + at);
}

/* scores [rows][CHUNK] of queries [rows][stride], float32. */
INLINE void score_floats(const float *query, size_t stride, const Chunk *c, const int kind, const int rows, float *scores) {
    for (int first = 0; first < BLOCKS; first += KEYS_AT_ONCE) {
        floats acc[TOGETHER][KEYS_AT_ONCE];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int k = 0; k < KEYS_AT_ONCE; k++) acc[r][k] = spread(0.0f);
        for (size_t i = 0; i < c->head_dim; i += 2)
#pragma GCC unroll 2
            for (int second = 0; second < 2; second++) {
                size_t at = (kind == BFLOAT16 ? i : i + second) * BLOCK;
                floats key[KEYS_AT_ONCE];
#pragma GCC unroll 4
                for (int k = 0; k < KEYS_AT_ONCE; k++) {
                    key[k] = read_lanes(c->keys[first + k], kind, at, second);
                    if (begins_line(kind, at)) __builtin_prefetch(c->next_keys[first + k] + at * kind_bytes(kind));
                }
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    floats one = spread(query[r * stride + i + second]);
#pragma GCC unroll 4
                    for (int k = 0; k < KEYS_AT_ONCE; k++) acc[r][k] = fused(one, key[k], acc[r][k]);
                }
            }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int k = 0; k < KEYS_AT_ONCE; k++) store(scores + r * CHUNK + BLOCK * (first + k), acc[r][k]);
    }
}

/* out [rows][stride of `out`] *= factors, then += weights [rows][CHUNK] times values of tokens [from, to) of the chunk, in `width` vectors from
   `column` on. */
INLINE void add_floats(const float *weights, const Chunk *c, const int kind, const int rows, const int width, size_t column, size_t from,
                       size_t to, const float *factors, float *out, size_t out_stride) {
    const int step = kind == BFLOAT16 ? 2 : 1;
    floats acc[TOGETHER][KEYS_AT_ONCE];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int k = 0; k < width; k++) acc[r][k] = multiply(load(out + r * out_stride + column + 16 * k), spread(factors[r]));
    for (size_t token = from / step * step; token < to; token += step)
#pragma GCC unroll 2
        for (int j = 0; j < step; j++) {
            if (step > 1 && (token + j < from || token + j >= to)) continue;
            size_t row = (token + j) % BLOCK;
            const char *block = c->values[token / BLOCK], *next = c->next_values[token / BLOCK];
            floats value[KEYS_AT_ONCE];
#pragma GCC unroll 4
            for (int k = 0; k < width; k++) {
                size_t at = kind == BFLOAT16 ? (row / 2 * c->stride + column + 16 * k) * 2 : row * c->stride + column + 16 * k;
                value[k] = read_lanes(block, kind, at, j);
                if (begins_line(kind, at)) __builtin_prefetch(next + at * kind_bytes(kind));
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                floats weight = spread(weights[r * CHUNK + token + j]);
#pragma GCC unroll 4
                for (int k = 0; k < width; k++) acc[r][k] = fused(weight, value[k], acc[r][k]);
            }
        }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int k = 0; k < width; k++) store(out + r * out_stride + column + 16 * k, acc[r][k]);
}

#ifdef HAS_PAIRS
/* The same with queries and weights in bfloat16. */
INLINE void score_pairs(const uint16_t *query, size_t stride, const Chunk *c, const int rows, float *scores) {
    floats acc[TOGETHER][BLOCKS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int k = 0; k < BLOCKS; k++) acc[r][k] = spread(0.0f);
    for (size_t i = 0; i < c->head_dim; i += 2) {
        pairs key[BLOCKS];
#pragma GCC unroll 4
        for (int k = 0; k < BLOCKS; k++) {
            key[k] = load_pairs(c->keys[k], i * BLOCK, 32);
            __builtin_prefetch(c->next_keys[k] + i * BLOCK * 2);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            pairs one = spread_pair(query + r * stride + i);
#pragma GCC unroll 4
            for (int k = 0; k < BLOCKS; k++) add_pair_products(&acc[r][k], key[k], one);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int k = 0; k < BLOCKS; k++) store(scores + r * CHUNK + BLOCK * k, acc[r][k]);
}

/* The pair that begins at `token`, of which only `halves` take part if it is cut. */
INLINE void add_pair(floats acc[TOGETHER][BLOCKS], const uint16_t *weights, const Chunk *c, const int rows, const int width, size_t column,
                     size_t token, const int is_cut, uint32_t halves) {
    const char *block = c->values[token / BLOCK], *next = c->next_values[token / BLOCK];
    pairs value[BLOCKS];
#pragma GCC unroll 4
    for (int k = 0; k < width; k++) {
        size_t at = (token % BLOCK / 2 * c->stride + column + 16 * k) * 2;
        value[k] = load_pairs(block, at, 2 * (c->head_dim - column) - 32 * k);
        if (is_cut) value[k] = keep_halves(value[k], halves);
        __builtin_prefetch(next + at * 2);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        pairs weight = spread_pair(weights + r * CHUNK + token);
#pragma GCC unroll 4
        for (int k = 0; k < width; k++) add_pair_products(&acc[r][k], value[k], weight);
    }
}

/* A pair that is cut by an odd `from` or `to` takes part with one half, as in any other call that cuts it so. */
INLINE void add_pairs(const uint16_t *weights, const Chunk *c, const int rows, const int width, size_t column, size_t from, size_t to,
                      const float *factors, float *out, size_t out_stride) {
    floats acc[TOGETHER][BLOCKS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int k = 0; k < width; k++) acc[r][k] = multiply(load(out + r * out_stride + column + 16 * k), spread(factors[r]));
    size_t token = from / 2 * 2;
    if (from % 2) {
        add_pair(acc, weights, c, rows, width, column, token, 1, 0xffff0000u);
        token += 2;
    }
    for (; token + 2 <= to; token += 2) add_pair(acc, weights, c, rows, width, column, token, 0, 0);
    if (token < to) add_pair(acc, weights, c, rows, width, column, token, 1, 0xffffu);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int k = 0; k < width; k++) store(out + r * out_stride + column + 16 * k, acc[r][k]);
}
#endif

/* `rows` is 1 or TOGETHER in both; queries and weights have the type of the kind. */
static void score_rows(const void *query, size_t stride, const Chunk *c, int kind, int rows, float *scores) {
#define SCORE(kind) \
    if (rows == 1) score_floats(query, stride, c, kind, 1, scores); \
    else score_floats(query, stride, c, kind, TOGETHER, scores)
    switch (kind) {
        case FLOAT32: SCORE(FLOAT32); break;
        case BFLOAT16: SCORE(BFLOAT16); break;
        case FLOAT16: SCORE(FLOAT16); break;
        case INT8: SCORE(INT8); break;
        case CONVERTED: SCORE(CONVERTED); break;
#ifdef HAS_PAIRS
        case PAIRS:
            if (rows == 1) score_pairs(query, stride, c, 1, scores);
            else score_pairs(query, stride, c, TOGETHER, scores);
            break;
#endif
    }
#undef SCORE
}

INLINE void add_columns(const void *weights, const Chunk *c, int kind, int rows, const int width, size_t column, size_t from, size_t to,
                        const float *factors, float *out, size_t out_stride) {
#define ADD(kind) \
    if (rows == 1) add_floats(weights, c, kind, 1, width, column, from, to, factors, out, out_stride); \
    else add_floats(weights, c, kind, TOGETHER, width, column, from, to, factors, out, out_stride)
    switch (kind) {
        case FLOAT32: ADD(FLOAT32); break;
        case BFLOAT16: ADD(BFLOAT16); break;
        case FLOAT16: ADD(FLOAT16); break;
        case INT8: ADD(INT8); break;
        case CONVERTED: ADD(CONVERTED); break;
#ifdef HAS_PAIRS
        case PAIRS:
            if (rows == 1) add_pairs(weights, c, 1, width, column, from, to, factors, out, out_stride);
            else add_pairs(weights, c, TOGETHER, width, column, from, to, factors, out, out_stride);
            break;
#endif
    }
#undef ADD
}

static void add_values(const void *weights, const Chunk *c, int kind, int rows, size_t from, size_t to, const float *factors, float *out,
                       size_t out_stride) {
    for (size_t column = 0; column < out_stride; column += 16 * KEYS_AT_ONCE)
        switch (smaller(KEYS_AT_ONCE, (out_stride - column) / 16)) {
            case 1: add_columns(weights, c, kind, rows, 1, column, from, to, factors, out, out_stride); break;
#if KEYS_AT_ONCE > 1
            case 2: add_columns(weights, c, kind, rows, 2, column, from, to, factors, out, out_stride); break;
            case 3: add_columns(weights, c, kind, rows, 3, column, from, to, factors, out, out_stride); break;
            case 4: add_columns(weights, c, kind, rows, 4, column, from, to, factors, out, out_stride); break;
#endif
        }
}

#endif
