/* Activations times a float weight: every output element is one sum over the columns in a fixed order.

   bfloat16 uses the CPU's dot product of pairs; float32 and float16 are computed in float32. */
#include "kernels.h"
#include "vectors.h"

enum { CACHED_BYTES = 256 << 10 };

typedef struct {
    const char *x;       /* [tokens][columns] */
    const char *weight;  /* [rows][columns] */
    size_t columns;
    void *out;           /* [tokens][out_stride] */
    size_t out_stride;
} Product;

INLINE void multiply_tile(const Product *p, const int dtype, size_t token, size_t row, const size_t count, size_t valid) {
    const size_t bytes = p->columns * item_bytes(dtype);
    const char *w[FLOAT_ROWS], *next = p->weight + (row + FLOAT_ROWS) * bytes;
#pragma GCC unroll 8
    for (size_t j = 0; j < FLOAT_ROWS; j++) w[j] = p->weight + (row + smaller(j, valid - 1)) * bytes;
    const char *x = p->x + token * bytes;
    floats acc[FLOAT_TOKENS][FLOAT_ROWS];
#pragma GCC unroll 8
    for (size_t i = 0; i < count; i++)
#pragma GCC unroll 8
        for (size_t j = 0; j < FLOAT_ROWS; j++) acc[i][j] = spread(0.0f);
#ifdef HAS_PAIRS
    if (dtype == BFLOAT16)
        for (size_t column = 0; column < p->columns; column += 32) {
            size_t left = p->columns - column;
            pairs wide[FLOAT_ROWS];
#pragma GCC unroll 8
            for (size_t j = 0; j < FLOAT_ROWS; j++) {
                __builtin_prefetch(next + (column * 2 * FLOAT_ROWS + j * 64), 0, 2);
                wide[j] = load_pairs(w[j], column, left);
            }
#pragma GCC unroll 8
            for (size_t i = 0; i < count; i++) {
                pairs part = load_pairs(x + i * bytes, column, left);
#pragma GCC unroll 8
                for (size_t j = 0; j < FLOAT_ROWS; j++) add_pair_products(&acc[i][j], wide[j], part);
            }
        }
    else
#endif
        for (size_t column = 0; column < p->columns; column += 16) {
            size_t count_lanes = lanes(column, p->columns);
            floats wide[FLOAT_ROWS];
#pragma GCC unroll 8
            for (size_t j = 0; j < FLOAT_ROWS; j++) {
                __builtin_prefetch(next + (column * item_bytes(dtype) * FLOAT_ROWS + j * item_bytes(dtype) * 16), 0, 2);
                wide[j] = load_floats(w[j], dtype, column, count_lanes);
            }
#pragma GCC unroll 8
            for (size_t i = 0; i < count; i++) {
                floats part = load_floats(x + i * bytes, dtype, column, count_lanes);
#pragma GCC unroll 8
                for (size_t j = 0; j < FLOAT_ROWS; j++) acc[i][j] = fused(wide[j], part, acc[i][j]);
            }
        }
#pragma GCC unroll 8
    for (size_t i = 0; i < count; i++) {
        floats none = spread(0.0f);
        four_floats sum = sum_four_floats(acc[i][0], acc[i][1], FLOAT_ROWS > 2 ? acc[i][2] : none, FLOAT_ROWS > 2 ? acc[i][3] : none);
        store_four(p->out, dtype, (token + i) * p->out_stride + row, sum, valid);
    }
}

INLINE void multiply_rows(const Product *p, const int dtype, size_t token, size_t count, size_t first, size_t stop) {
    for (size_t row = first; row < stop; row += FLOAT_ROWS) {
        size_t valid = smaller(FLOAT_ROWS, stop - row);
        switch (count) {
            case 1: multiply_tile(p, dtype, token, row, 1, valid); break;
            case 2: multiply_tile(p, dtype, token, row, 2, valid); break;
            case 3: multiply_tile(p, dtype, token, row, 3, valid); break;
#if FLOAT_TOKENS > 3
            case 4: multiply_tile(p, dtype, token, row, 4, valid); break;
            case 5: multiply_tile(p, dtype, token, row, 5, valid); break;
            case 6: multiply_tile(p, dtype, token, row, 6, valid); break;
#endif
        }
    }
}

static void multiply_float32(const Product *p, size_t token, size_t count, size_t first, size_t stop) {
    multiply_rows(p, FLOAT32, token, count, first, stop);
}

static void multiply_bfloat16(const Product *p, size_t token, size_t count, size_t first, size_t stop) {
    multiply_rows(p, BFLOAT16, token, count, first, stop);
}

static void multiply_float16(const Product *p, size_t token, size_t count, size_t first, size_t stop) {
    multiply_rows(p, FLOAT16, token, count, first, stop);
}

/* out [tokens, rows] = x [tokens, columns] times weight [rows, columns], all of the same type. */
void tandem_float_linear(const void *x, int dtype, size_t tokens, size_t columns, const void *weight, size_t rows, void *out,
                         size_t out_stride, int threads) {
    static void (*const multiply[])(const Product *, size_t, size_t, size_t, size_t) = {multiply_float32, multiply_bfloat16, multiply_float16};
    Product p = {x, weight, columns, out, out_stride};
    size_t row_bytes = columns * item_bytes(dtype), tiles = (rows + FLOAT_ROWS - 1) / FLOAT_ROWS;
    /* As in int8_linear.c: few tokens stay in the cache; with many, a block of the weight does. */
    size_t block = tokens * row_bytes <= CACHED_BYTES ? FLOAT_ROWS : CACHED_BYTES / row_bytes / FLOAT_ROWS * FLOAT_ROWS;
    if (block < FLOAT_ROWS) block = FLOAT_ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        size_t first = smaller(tiles * thread / threads * FLOAT_ROWS, rows), stop = smaller(tiles * (thread + 1) / threads * FLOAT_ROWS, rows);
        for (size_t row = first; row < stop; row += block)
            for (size_t token = 0; token < tokens; token += FLOAT_TOKENS)
                multiply[dtype](&p, token, smaller(FLOAT_TOKENS, tokens - token), row, smaller(row + block, stop));
    }
}
