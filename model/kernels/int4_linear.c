/* Activations times a 4-bit weight, in exact integer arithmetic: the results of int8_linear.c on the same integers, bit for bit.

   A weight is packed in tiles of 16 rows, each lane of a vector one row, so that no sum crosses lanes: for every 8 columns of a group 64
   bytes, 4 bytes a row, low nibbles the first 4 columns and high nibbles the others. A nibble is the integer plus the zero point of its
   row and group. The columns of a group are padded with nibbles of 0 to a multiple of 8. */
#include "kernels.h"
#include "slices.h"

enum { LANES = 16, STEP = 8, STEP_BYTES = 64, CACHED_BYTES = 256 << 10 };

typedef struct {
    Slices cut;
    const uint8_t *packed;   /* [tiles][steps][64] */
    const float *scale;      /* [tiles][groups][16] */
    const int8_t *zeros;     /* [tiles][groups][16] */
    const int64_t *starts;   /* [groups + 1]: first column of each group */
    size_t groups, steps, num_slices, rows;
    void *out;               /* [tokens][out_stride] */
    size_t out_stride;
    int out_dtype;
} Product;

static size_t count_steps(const int64_t *starts, size_t groups) {
    size_t steps = 0;
    for (size_t group = 0; group < groups; group++) steps += (starts[group + 1] - starts[group] + STEP - 1) / STEP;
    return steps;
}

INLINE void multiply_tile(const Product *p, size_t slice, size_t tile, const size_t count) {
    const uint8_t *packed = p->packed + tile * p->steps * STEP_BYTES;
    floats product[NIBBLE_SLICES];
    for (size_t group = 0; group < p->groups; group++) {
        size_t steps = (p->starts[group + 1] - p->starts[group] + STEP - 1) / STEP, at = (tile * p->groups + group) * LANES;
        ints sums[NIBBLE_SLICES], zero = to_ints(load_bytes(p->zeros + at, LANES));
        floats scale = load(p->scale + at);
#pragma GCC unroll 8
        for (size_t i = 0; i < count; i++) sums[i] = spread_int(0);
        add_nibble_products(sums, count, packed, p->cut.bytes + slice * p->cut.padded + p->starts[group], p->cut.padded, steps);
        packed += steps * STEP_BYTES;
#pragma GCC unroll 8
        for (size_t i = 0; i < count; i++) {
            ints shift = multiply_ints(zero, spread_int(p->cut.sums[(slice + i) * p->groups + group]));
            floats scaled = multiply(to_floats(subtract_ints(sums[i], shift)), scale);
            product[i] = group ? add(product[i], scaled) : scaled;
        }
    }
    size_t n = p->num_slices;
    for (size_t first = 0; first < count; first += n) {
        size_t token = (slice + first) / n;
        floats total = product[first + n - 1];
        for (size_t k = n - 1; k-- > 0;) total = add(divide(total, spread(254.0f)), product[first + k]);
        total = multiply(total, spread(p->cut.row_scale[token]));
        store_floats(p->out, p->out_dtype, token * p->out_stride + tile * LANES, total, lanes(tile * LANES, p->rows));
    }
}

static void multiply_tiles(const Product *p, size_t slice, size_t count, size_t first, size_t stop) {
    for (size_t tile = first; tile < stop; tile++) switch (count) {
            case 1: multiply_tile(p, slice, tile, 1); break;
            case 2: multiply_tile(p, slice, tile, 2); break;
            case 3: multiply_tile(p, slice, tile, 3); break;
#if NIBBLE_SLICES > 3
            case 4: multiply_tile(p, slice, tile, 4); break;
#endif
#if NIBBLE_SLICES > 4
            case 5: multiply_tile(p, slice, tile, 5); break;
            case 6: multiply_tile(p, slice, tile, 6); break;
            case 7: multiply_tile(p, slice, tile, 7); break;
            case 8: multiply_tile(p, slice, tile, 8); break;
#endif
        }
}

/* out [tokens, rows] = x [tokens, columns] times a packed weight; x and `inputs` as in tandem_int8_linear, but without a correction. Returns 0, or 1 when out
   of memory. */
int tandem_int4_linear(const void *x, int dtype, size_t tokens, size_t columns, const uint8_t *packed, size_t rows, const float *scale,
                       const int8_t *zeros, const int64_t *starts, size_t groups, const Inputs *inputs, void *out, int out_dtype,
                       size_t out_stride, int threads) {
    Slices cut;
    if (cut_all_slices(inputs, x, dtype, tokens, columns, starts, groups, threads, &cut)) return 1;
    size_t each = inputs->num_slices ? inputs->num_slices : 1, total = tokens * each, at_once = NIBBLE_SLICES / each * each;
    Product p = {cut, packed, scale, zeros, starts, groups, count_steps(starts, groups), each, rows, out, out_stride, out_dtype};
    size_t tiles = (rows + LANES - 1) / LANES, block = CACHED_BYTES / (p.steps * STEP_BYTES);
    if (block < 1) block = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        size_t first = tiles * thread / threads, stop = tiles * (thread + 1) / threads;
        for (size_t tile = first; tile < stop; tile += block)
            for (size_t slice = 0; slice < total; slice += at_once)
                multiply_tiles(&p, slice, smaller(at_once, total - slice), tile, smaller(tile + block, stop));
    }
    return 0;
}

/* Pack weight int8 [rows, columns] into `packed` and `zeros`. Returns 0, or 1 if the integers of a row and group span more than 4 bits. */
int tandem_pack_int4(const int8_t *weight, size_t rows, size_t columns, const int64_t *starts, size_t groups, uint8_t *packed,
                     int8_t *zeros, int threads) {
    size_t tiles = (rows + LANES - 1) / LANES, all_steps = count_steps(starts, groups);
    int failed = 0;
#pragma omp parallel for num_threads(threads) reduction(| : failed) if (threads > 1)
    for (size_t tile = 0; tile < tiles; tile++) {
        uint8_t *to = packed + tile * all_steps * STEP_BYTES;
        memset(to, 0, all_steps * STEP_BYTES);
        for (size_t group = 0; group < groups; group++) {
            size_t size = starts[group + 1] - starts[group];
            int8_t *zero = zeros + (tile * groups + group) * LANES;
            for (size_t lane = 0; lane < LANES; lane++) {
                zero[lane] = 0;
                if (tile * LANES + lane >= rows) continue;
                const int8_t *row = weight + (tile * LANES + lane) * columns + starts[group];
                int8_t least = 127, most = -128;
                for (size_t i = 0; i < size; i++) {
                    least = row[i] < least ? row[i] : least;
                    most = row[i] > most ? row[i] : most;
                }
                if (most - least > 15) {
                    failed |= 1;
                    continue;
                }
                zero[lane] = least >= -8 && most <= 7 ? 8 : -least;
                for (size_t i = 0; i < size; i++)
                    to[i / STEP * STEP_BYTES + lane * 4 + i % 4] |= (row[i] + zero[lane]) << (i % STEP < 4 ? 0 : 4);
            }
            to += (size + STEP - 1) / STEP * STEP_BYTES;
        }
    }
    return failed;
}
