/* Activations times an int8 weight, in exact integer arithmetic; see model/backends/int8.py for the formula.

   The weight is used as stored: row-major, one signed byte per element. A tile is a few tokens with all their slices times four rows of
   the weight, held in registers over all columns of a group. With one token the weight is read once, at memory bandwidth. */
/* With this step, GCC 12 keeps constants in registers that the sums need. */
#pragma GCC optimize("no-gcse")

#include "int8_product.h"

enum { CACHED_BYTES = 256 << 10, NEAR_BYTES = 8 << 10 };

/* Slices that one instruction multiplies. */
#ifdef HAS_PAIR_TILES
enum { SLICES_AT_ONCE = 2 };
#else
enum { SLICES_AT_ONCE = 1 };
#endif

/* Multiply `count` slice rows from `slice` on by four weight rows from `row` on (`valid` of them exist), into out[token][row]. */
INLINE void multiply_tile(const Product *p, size_t slice, size_t row, const size_t count, size_t valid) {
    const int8_t *w[INT_ROWS];
    /* Prefetch the next four rows in memory order, as far ahead as possible without evicting data in use. */
    const char *next = (const char *)p->weight + (row + INT_ROWS) * p->columns;
    const int near = p->alone && INT_ROWS * p->columns <= NEAR_BYTES;
#pragma GCC unroll 8
    for (size_t j = 0; j < INT_ROWS; j++) w[j] = p->weight + (row + smaller(j, valid - 1)) * p->columns;
    four_floats product[INT_SLICES];
    for (size_t group = 0; group < p->groups; group++) {
        size_t start = p->starts[group], stop = p->starts[group + 1], column = start;
        int_sums sums[INT_SLICES][INT_ROWS];
#pragma GCC unroll 8
        for (size_t i = 0; i < count; i++)
#pragma GCC unroll 8
            for (size_t j = 0; j < INT_ROWS; j++) sums[i][j] = no_sums();
        const int8_t *s = p->slices + slice * p->padded;
        for (; column + WIDTH <= stop; column += WIDTH) {
            weights weight[INT_ROWS];
#pragma GCC unroll 8
            for (size_t j = 0; j < INT_ROWS; j++) {
                if (near) __builtin_prefetch(next + column * INT_ROWS + j * WIDTH, 0, 3);
                else __builtin_prefetch(next + column * INT_ROWS + j * WIDTH, 0, 2);
                weight[j] = load_weights(w[j] + column);
            }
#pragma GCC unroll 8
            for (size_t i = 0; i < count; i += SLICES_AT_ONCE) {
                slices part = load_slices(s + i * p->padded + column);
#ifdef HAS_PAIR_TILES
                slices other = load_slices(s + (i + 1 < count ? i + 1 : i) * p->padded + column);
#pragma GCC unroll 8
                for (size_t j = 0; j < INT_ROWS; j += 2) add_pair_tile(&sums[i][j], part, other, weight[j], weight[j + 1]);
#else
#pragma GCC unroll 8
                for (size_t j = 0; j < INT_ROWS; j++) add_products(&sums[i][j], weight[j], part);
#endif
            }
        }
        if (column < stop) {
            weights weight[INT_ROWS];
#pragma GCC unroll 8
            for (size_t j = 0; j < INT_ROWS; j++) weight[j] = load_weights_part(w[j] + column, stop - column);
#pragma GCC unroll 8
            for (size_t i = 0; i < count; i += SLICES_AT_ONCE) {
                slices part = load_slices_part(s + i * p->padded + column, stop - column);
#ifdef HAS_PAIR_TILES
                slices other = load_slices_part(s + (i + 1 < count ? i + 1 : i) * p->padded + column, stop - column);
#pragma GCC unroll 8
                for (size_t j = 0; j < INT_ROWS; j += 2) add_pair_tile(&sums[i][j], part, other, weight[j], weight[j + 1]);
#else
#pragma GCC unroll 8
                for (size_t j = 0; j < INT_ROWS; j++) add_products(&sums[i][j], weight[j], part);
#endif
            }
        }
        float scales[INT_ROWS];
        for (size_t j = 0; j < INT_ROWS; j++) scales[j] = p->scale[(row + smaller(j, valid - 1)) * p->groups + group];
        four_floats scale;
        memcpy(&scale, scales, sizeof scale);
#pragma GCC unroll 8
        for (size_t i = 0; i < count; i++) {
            four_ints shift = (four_ints){0} + WEIGHT_OFFSET * p->sums[(slice + i) * p->groups + group];
#ifdef HAS_PAIR_TILES
            four_ints sum = read_pair_tiles(sums[i / 2 * 2][0], sums[i / 2 * 2][2], i % 2);
#else
            four_ints sum = sum_four_ints(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
#endif
            four_floats scaled = __builtin_convertvector(sum - shift, four_floats) * scale;
            product[i] = group ? product[i] + scaled : scaled;
        }
    }
    size_t n = p->num_slices;
    for (size_t first = 0; first < count; first += n) {
        size_t token = (slice + first) / n;
        four_floats total = product[first + n - 1];
        for (size_t k = n - 1; k-- > 0;) total = total / 254.0f + product[first + k];
        if (p->correction) {
            float parts[INT_ROWS];
            for (size_t j = 0; j < INT_ROWS; j++) parts[j] = p->correction[row + smaller(j, valid - 1)];
            four_floats correction;
            memcpy(&correction, parts, sizeof correction);
            total = total - correction;
        }
        store_four(p->out, p->out_dtype, token * p->out_stride + row, total * p->row_scale[token], valid);
    }
}

static void multiply_rows(const Product *p, size_t slice, size_t count, size_t first, size_t stop) {
    for (size_t row = first; row < stop; row += INT_ROWS) {
        size_t valid = smaller(INT_ROWS, stop - row);
        switch (count) {
            case 1: multiply_tile(p, slice, row, 1, valid); break;
            case 2: multiply_tile(p, slice, row, 2, valid); break;
#if INT_SLICES > 2
            case 3: multiply_tile(p, slice, row, 3, valid); break;
#endif
#if INT_SLICES > 3
            case 4: multiply_tile(p, slice, row, 4, valid); break;
            case 5: multiply_tile(p, slice, row, 5, valid); break;
            case 6: multiply_tile(p, slice, row, 6, valid); break;
#endif
        }
    }
}

/* Number of weight rows that all tokens are multiplied by before moving on. While one tile is multiplied the next is prefetched, so few
   tokens use one tile at a time. The slices of many tokens exceed the L2 cache; then a block of the weight has to fit it instead. */
static size_t rows_a_block(size_t columns, size_t slice_bytes) {
    size_t rows = slice_bytes <= CACHED_BYTES ? 0 : CACHED_BYTES / columns / INT_ROWS * INT_ROWS;
    return rows < INT_ROWS ? INT_ROWS : rows;
}

/* out [tokens, rows] = x [tokens, columns] times weight [rows, columns] with scale [rows, groups].

   x is float32, bfloat16 or float16, or int8 if `inputs` has no slices. Returns 0, or 1 when out of memory. */
int tandem_int8_linear(const void *x, int dtype, size_t tokens, size_t columns, const int8_t *weight, size_t rows,
                       const float *scale, const int64_t *starts, size_t groups, const Inputs *inputs, void *out, int out_dtype,
                       size_t out_stride, int threads) {
    Slices cut;
    if (cut_all_slices(inputs, x, dtype, tokens, columns, starts, groups, threads, &cut)) return 1;
    size_t each = inputs->num_slices ? inputs->num_slices : 1, total = tokens * each, at_once = INT_SLICES / each * each;
    Product p = {cut.bytes, cut.sums, cut.row_scale, cut.padded, weight, scale, starts, columns, groups, each, out, out_stride, out_dtype,
                 inputs->correction, total <= INT_SLICES};
#ifdef HAS_PANELS
    if (total >= FEWEST_PANEL_SLICES) return multiply_in_panels(&p, total, rows, threads);
#endif
    size_t block = rows_a_block(columns, total * cut.padded), tiles = (rows + INT_ROWS - 1) / INT_ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        size_t first = smaller(tiles * thread / threads * INT_ROWS, rows), stop = smaller(tiles * (thread + 1) / threads * INT_ROWS, rows);
        for (size_t row = first; row < stop; row += block)
            for (size_t slice = 0; slice < total; slice += at_once)
                multiply_rows(&p, slice, smaller(at_once, total - slice), row, smaller(row + block, stop));
    }
    return 0;
}
