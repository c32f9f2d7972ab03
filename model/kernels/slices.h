/* Rows of activations cut into int8 slices; see model/backends/int8.py for the formula. */
#ifndef TANDEM_SLICES_H
#define TANDEM_SLICES_H

#include "vectors.h"

/* One token's activations as `num_slices` (1 to 3) rows of `padded` bytes, zero-padded, with the sum of each slice in each group and the
   factor of the results. One slice: 8-bit activations, 255 steps from -absmax to absmax as in compressed-tensors. */
INLINE void cut_slices(const void *x, int dtype, size_t columns, size_t padded, size_t groups, const int64_t *starts, size_t num_slices,
                       int8_t *slices, int32_t *sums, float *row_scale) {
    floats most = spread(0.0f);
    int odd = 0;
    for (size_t i = 0; i < columns; i += 16) {
        floats value = absolute(load_floats(x, dtype, i, lanes(i, columns)));
        odd |= any_above(value, 3.4028234e38f);
        most = maximum(most, value);
    }
    float scale = largest(most) / (num_slices == 1 ? 127.5f : 127.0f);
    if (scale < 1e-30f) scale = 1e-30f;
    *row_scale = odd ? NAN : scale;
    for (size_t i = 0; i < padded; i += 16) {
        floats left = spread(0.0f);
        if (i < columns) left = divide(load_floats(x, dtype, i, lanes(i, columns)), spread(scale));
        if (num_slices == 1) left = minimum(spread(127.0f), maximum(spread(-128.0f), left));
        for (size_t k = 0; k < num_slices; k++) {
            ints whole = to_ints(left);
            left = multiply(subtract(left, to_floats(whole)), spread(254.0f));
            store_bytes(slices + k * padded + i, whole, 16);
        }
    }
    for (size_t k = 0; k < num_slices; k++)
        for (size_t group = 0; group < groups; group++) {
            sums[k * groups + group] = sum_bytes(slices + k * padded + starts[group], starts[group + 1] - starts[group]);
        }
}

/* The slices of all tokens of a call, in a buffer that each thread keeps. */
typedef struct {
    int8_t *bytes;      /* [tokens][num_slices][padded] */
    int32_t *sums;      /* [tokens][num_slices][groups] */
    float *row_scale;   /* [tokens] */
    size_t padded;
} Slices;

static _Thread_local void *kept_slices;
static _Thread_local size_t kept_slice_bytes;

/* Cut x [tokens, columns] of `dtype`; if `num_slices` is 0, x is int8 and is copied as one slice. Returns 0, or 1 when out of memory. */
static int cut_all_slices(const void *x, int dtype, size_t tokens, size_t columns, const int64_t *starts, size_t groups, size_t num_slices,
                          int threads, Slices *cut) {
    size_t padded = (columns + 63) / 64 * 64, count = num_slices ? num_slices : 1;
    size_t slice_bytes = tokens * count * padded, sums_bytes = (tokens * count * groups * 4 + 63) / 64 * 64;
    char *memory = keep_bytes(&kept_slices, &kept_slice_bytes, slice_bytes + sums_bytes + tokens * 4);
    if (!memory) return 1;
    *cut = (Slices){(int8_t *)memory, (int32_t *)(memory + slice_bytes), (float *)(memory + slice_bytes + sums_bytes), padded};
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 4)
    for (size_t token = 0; token < tokens; token++) {
        int8_t *bytes = (int8_t *)memory + token * count * padded;
        int32_t *sums = cut->sums + token * count * groups;
        if (num_slices) {
            const char *row = (const char *)x + token * columns * item_bytes(dtype);
            cut_slices(row, dtype, columns, padded, groups, starts, num_slices, bytes, sums, cut->row_scale + token);
            continue;
        }
        memset(bytes, 0, padded);
        memcpy(bytes, (const int8_t *)x + token * columns, columns);
        for (size_t group = 0; group < groups; group++) sums[group] = sum_bytes(bytes + starts[group], starts[group + 1] - starts[group]);
        cut->row_scale[token] = 1.0f;
    }
    return 0;
}

#endif
