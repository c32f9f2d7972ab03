/* Rows of activations cut into int8 slices; see model/backends/int8.py for the formula. */
#ifndef TANDEM_SLICES_H
#define TANDEM_SLICES_H

#include "kernels.h"
#include "vectors.h"

/* Inputs [i, i + 16) of one token, divided if there is a divisor. */
INLINE floats load_inputs(const Inputs *in, const void *x, int dtype, size_t i, size_t columns) {
    size_t count = lanes(i, columns);
    floats value = load_floats(x, dtype, i, count);
    return in->divisor ? divide(value, load_part(in->divisor + i, count, spread(1.0f))) : value;
}

/* The factor of one token's results, which is also the size of a step of its slices; NaN if an input is no number. One slice: 255 steps
   from -absmax to absmax, as in compressed-tensors. */
INLINE float find_row_scale(const Inputs *in, const void *x, int dtype, size_t columns, float *step) {
    const float highest = in->scale ? INFINITY : 3.4028234e38f;
    floats most = spread(0.0f);
    int odd = 0;
    for (size_t i = 0; i < columns; i += 16) {
        floats value = absolute(load_inputs(in, x, dtype, i, columns));
        odd |= any_above(value, highest);
        most = maximum(most, value);
    }
    *step = in->scale ? in->scale : largest(most) / (in->num_slices == 1 ? 127.5f : 127.0f);
    if (!in->scale && *step < 1e-30f) *step = 1e-30f;
    return odd ? NAN : *step;
}

/* One token's activations as slices of `padded` bytes, zero-padded, and the sum of each slice in each group. Returns its row scale. */
INLINE float cut_slices(const Inputs *in, const void *x, int dtype, size_t columns, size_t padded, size_t groups, const int64_t *starts,
                        int8_t *slices, int32_t *sums) {
    float step, row_scale = find_row_scale(in, x, dtype, columns, &step);
    for (size_t i = 0; i < padded; i += 16) {
        floats left = spread(0.0f);
        if (i < columns && in->scale) {
            size_t count = lanes(i, columns);
            floats steps = in->divisor ? multiply(load_part(in->divisor + i, count, spread(1.0f)), spread(step)) : spread(step);
            left = add(divide(load_floats(x, dtype, i, count), steps), spread(in->zero_point));
        } else if (i < columns) {
            left = divide(load_inputs(in, x, dtype, i, columns), spread(step));
        }
        if (in->num_slices == 1) left = minimum(spread(127.0f), maximum(spread(-128.0f), left));
        for (size_t k = 0; k < in->num_slices; k++) {
            ints whole = to_ints(left);
            left = multiply(subtract(left, to_floats(whole)), spread(254.0f));
            store_bytes(slices + k * padded + i, whole, 16);
        }
    }
    if (in->scale) memset(slices + columns, 0, padded - columns); /* a zero point is not padding */
    for (size_t k = 0; k < in->num_slices; k++)
        for (size_t group = 0; group < groups; group++)
            sums[k * groups + group] = sum_bytes(slices + k * padded + starts[group], starts[group + 1] - starts[group]);
    return row_scale;
}

/* Tiles of slices may read this many rows past the last, without using the results. */
enum { SPARE_SLICES = 32 };

/* The slices of all tokens of a call, in a buffer that each thread keeps. */
typedef struct {
    int8_t *bytes;      /* [tokens][num_slices][padded] */
    int32_t *sums;      /* [tokens][num_slices][groups] */
    float *row_scale;   /* [tokens] */
    size_t padded;
} Slices;

static _Thread_local void *kept_slices;
static _Thread_local size_t kept_slice_bytes;

INLINE void permute(const char *from, const int64_t *order, size_t columns, int dtype, char *to) {
    if (dtype == FLOAT32)
        for (size_t i = 0; i < columns; i++) ((float *)to)[i] = ((const float *)from)[order[i]];
    else
        for (size_t i = 0; i < columns; i++) ((uint16_t *)to)[i] = ((const uint16_t *)from)[order[i]];
}

/* Cut x [tokens, columns] of `dtype`; int8 inputs are copied as one slice. Returns 0, or 1 when out of memory. */
__attribute__((unused)) static int cut_all_slices(const Inputs *in, const void *x, int dtype, size_t tokens, size_t columns, const int64_t *starts, size_t groups,
                          int threads, Slices *cut) {
    size_t padded = (columns + 63) / 64 * 64, count = in->num_slices ? in->num_slices : 1, row_bytes = columns * item_bytes(dtype);
    size_t slice_bytes = tokens * count * padded, sums_bytes = (tokens * count * groups * 4 + 63) / 64 * 64;
    size_t scale_bytes = (tokens * 4 + 63) / 64 * 64, ordered_bytes = in->order ? tokens * row_bytes : 0, spare_bytes = SPARE_SLICES * padded;
    char *memory = keep_bytes(&kept_slices, &kept_slice_bytes, slice_bytes + sums_bytes + scale_bytes + ordered_bytes + spare_bytes);
    if (!memory) return 1;
    *cut = (Slices){(int8_t *)memory, (int32_t *)(memory + slice_bytes), (float *)(memory + slice_bytes + sums_bytes), padded};
    char *ordered = memory + slice_bytes + sums_bytes + scale_bytes;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 4)
    for (size_t token = 0; token < tokens; token++) {
        int8_t *bytes = (int8_t *)memory + token * count * padded;
        int32_t *sums = cut->sums + token * count * groups;
        if (in->num_slices) {
            const char *row = (const char *)x + token * row_bytes;
            if (in->order) {
                permute(row, in->order, columns, dtype, ordered + token * row_bytes);
                row = ordered + token * row_bytes;
            }
            cut->row_scale[token] = cut_slices(in, row, dtype, columns, padded, groups, starts, bytes, sums);
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
