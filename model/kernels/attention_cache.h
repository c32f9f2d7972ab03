/* The new tokens of many sequences, and how their rotated keys and values are written to the KV cache (blocks: attention_products.h). */
#ifndef TANDEM_ATTENTION_CACHE_H
#define TANDEM_ATTENTION_CACHE_H

#include "attention_products.h"

typedef struct {
    char *rows;             /* [tokens][heads + 2 kv_heads][head_dim]: query, keys, values */
    int dtype;
    size_t tokens, heads, kv_heads, head_dim;
    const float *cosine, *sine; /* [tokens][head_dim]; the sine is signed */
    char *cache;            /* [blocks][2][kv_heads][block_size / BLOCK] of one layer: blocks of attention_products.h */
    float *token_scales;    /* [blocks][2][kv_heads][block_size], or NULL */
    const float *fixed_scales; /* [2][kv_heads][head_dim], or NULL; an int8 cache has one of the two */
    size_t block_size;
    const int64_t *spans;   /* [num_spans][3]: first token, earlier tokens of the sequence, index of its first block in `blocks` */
    size_t num_spans;
    const int64_t *blocks;
    size_t window;          /* tokens that a token sees, itself included; 0: all earlier ones */
    float softcap;          /* limit of the scores; 0: none */
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

/* Index of a token of a sequence in token_scales; of the first token of a block, times head_dim, also the block's first element. */
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

/* Write elements [first, first + count) of a block's token `row`. */
static void place_row(char *block, const char *from, size_t first, size_t count, size_t head_dim, size_t item, int in_pairs, size_t side, size_t row) {
    if (side && !in_pairs) {
        memcpy(block + (row * head_dim + first) * item, from, count * item);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        size_t at = first + i, to = at * BLOCK + row;
        if (in_pairs) to = side ? (row / 2 * head_dim + at) * 2 + row % 2 : (at / 2 * BLOCK + row) * 2 + at % 2;
        switch (item) {
            case 1: block[to] = from[i]; break;
            case 2: ((uint16_t *)block)[to] = ((const uint16_t *)from)[i]; break;
            default: ((uint32_t *)block)[to] = ((const uint32_t *)from)[i];
        }
    }
}

/* Write one token's key or value of one head to the cache; in int8 it is rounded to multiples of a scale. */
static void keep_row(const Call *c, const Span *s, size_t position, size_t side, size_t head, size_t at) {
    size_t place = find_place(c, s, position, side, head), row = position % BLOCK, item = is_int8(c) ? 1 : item_bytes(c->dtype);
    char *block = c->cache + (place - row) * c->head_dim * item;
    if (!is_int8(c)) {
        place_row(block, c->rows + at * item, 0, c->head_dim, c->head_dim, item, c->dtype == BFLOAT16, side, row);
        return;
    }
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
        if (c->fixed_scales) scale = load_part(c->fixed_scales + (side * c->kv_heads + head) * c->head_dim + i, count, spread(1.0f));
        /* Clamp before converting: values outside the 32-bit range would all become INT_MIN. */
        floats steps = divide(load_floats(c->rows, c->dtype, at + i, count), scale);
        steps = minimum(spread(127.0f), maximum(spread(-128.0f), steps));
        int8_t bytes[16];
        store_bytes(bytes, to_ints(steps), count);
        place_row(block, (const char *)bytes, i, count, c->head_dim, 1, 0, side, row);
    }
}

#endif
