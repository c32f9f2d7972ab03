/* Activations times a float weight: every output element is one sum over the columns in a fixed order.

   bfloat16 uses the CPU's dot product of pairs; float32 and float16 are computed in float32. */
#include "kernels.h"
#include "vectors.h"

enum { MAX_TOKENS = 6, MAX_ROWS = 4, CACHED_BYTES = 256 << 10 };

typedef struct {
    const char *x;       /* [tokens][columns] */
    const char *weight;  /* [rows][columns] */
    size_t columns;
    void *out;           /* [tokens][out_stride] */
    size_t out_stride;
} Product;

INLINE __m512i load_pairs(const char *row, size_t column, __mmask32 mask) {
    return _mm512_maskz_loadu_epi16(mask, (const uint16_t *)row + column);
}

INLINE void multiply_tile(const Product *p, const int dtype, size_t token, size_t row, const size_t count, size_t valid) {
    const size_t bytes = p->columns * item_bytes(dtype);
    const char *w[MAX_ROWS], *next = p->weight + (row + MAX_ROWS) * bytes;
#pragma GCC unroll 8
    for (size_t j = 0; j < MAX_ROWS; j++) w[j] = p->weight + (row + smaller(j, valid - 1)) * bytes;
    const char *x = p->x + token * bytes;
    __m512 acc[MAX_TOKENS][MAX_ROWS];
#pragma GCC unroll 8
    for (size_t i = 0; i < count; i++)
#pragma GCC unroll 8
        for (size_t j = 0; j < MAX_ROWS; j++) acc[i][j] = _mm512_setzero_ps();
    const size_t step = dtype == BFLOAT16 ? 32 : 16;
    for (size_t column = 0; column < p->columns; column += step) {
        size_t left = p->columns - column;
        if (dtype == BFLOAT16) {
            __mmask32 mask = left >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1;
            __m512i wide[MAX_ROWS];
#pragma GCC unroll 8
            for (size_t j = 0; j < MAX_ROWS; j++) {
                _mm_prefetch(next + (column * 2 * MAX_ROWS + j * 64), _MM_HINT_T1);
                wide[j] = load_pairs(w[j], column, mask);
            }
#pragma GCC unroll 8
            for (size_t i = 0; i < count; i++) {
                __m512i part = load_pairs(x + i * bytes, column, mask);
#pragma GCC unroll 8
                for (size_t j = 0; j < MAX_ROWS; j++) add_pair_products(&acc[i][j], wide[j], part);
            }
        } else {
            __mmask16 mask = lanes(column, p->columns);
            __m512 wide[MAX_ROWS];
#pragma GCC unroll 8
            for (size_t j = 0; j < MAX_ROWS; j++) {
                _mm_prefetch(next + (column * item_bytes(dtype) * MAX_ROWS + j * item_bytes(dtype) * 16), _MM_HINT_T1);
                wide[j] = load_floats(w[j], dtype, column, mask);
            }
#pragma GCC unroll 8
            for (size_t i = 0; i < count; i++) {
                __m512 part = load_floats(x + i * bytes, dtype, column, mask);
#pragma GCC unroll 8
                for (size_t j = 0; j < MAX_ROWS; j++) acc[i][j] = _mm512_fmadd_ps(wide[j], part, acc[i][j]);
            }
        }
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < count; i++) {
        __m128 sum = sum_four_floats(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
        store_floats(p->out, dtype, (token + i) * p->out_stride + row, _mm512_zextps128_ps512(sum), (__mmask16)((1u << valid) - 1));
    }
}

INLINE void multiply_rows(const Product *p, const int dtype, size_t token, size_t count, size_t first, size_t stop) {
    for (size_t row = first; row < stop; row += MAX_ROWS) {
        size_t valid = smaller(MAX_ROWS, stop - row);
        switch (count) {
            case 1: multiply_tile(p, dtype, token, row, 1, valid); break;
            case 2: multiply_tile(p, dtype, token, row, 2, valid); break;
            case 3: multiply_tile(p, dtype, token, row, 3, valid); break;
            case 4: multiply_tile(p, dtype, token, row, 4, valid); break;
            case 5: multiply_tile(p, dtype, token, row, 5, valid); break;
            default: multiply_tile(p, dtype, token, row, 6, valid); break;
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
    size_t row_bytes = columns * item_bytes(dtype), tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    /* As in int8_linear.c: few tokens stay in the cache; with many, a block of the weight does. */
    size_t block = tokens * row_bytes <= CACHED_BYTES ? MAX_ROWS : CACHED_BYTES / row_bytes / MAX_ROWS * MAX_ROWS;
    if (block < MAX_ROWS) block = MAX_ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        size_t first = smaller(tiles * thread / threads * MAX_ROWS, rows), stop = smaller(tiles * (thread + 1) / threads * MAX_ROWS, rows);
        for (size_t row = first; row < stop; row += block)
            for (size_t token = 0; token < tokens; token += MAX_TOKENS)
                multiply[dtype](&p, token, smaller(MAX_TOKENS, tokens - token), row, smaller(row + block, stop));
    }
}
