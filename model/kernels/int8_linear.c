/* Activations times an int8 weight, in exact integer arithmetic; see model/backends/int8.py for the formula.

   The weight is used as stored: row-major, one signed byte per element. A tile is a few tokens with all their slices times four rows of
   the weight, held in registers over all columns of a group. With one token the weight is read once, at memory bandwidth. */
#include "kernels.h"
#include "vectors.h"

enum { MAX_SLICES = 6, MAX_ROWS = 4, CACHED_BYTES = 256 << 10, NEAR_BYTES = 8 << 10 };

typedef struct {
    const int8_t *slices;    /* [tokens][num_slices][padded columns], zero-padded */
    const int32_t *sums;     /* [tokens][num_slices][groups]: 128 times the sum of a slice's elements in a group */
    const float *row_scale;  /* [tokens] */
    size_t padded;
    const uint8_t *weight;   /* [rows][columns] */
    const float *scale;      /* [rows][groups] */
    const int64_t *starts;   /* [groups + 1]: first column of each group */
    size_t columns, groups, num_slices;
    void *out;               /* [tokens][out_stride] */
    size_t out_stride;
    int out_dtype;
    int alone;               /* whether one tile covers all slices */
} Product;

/* Multiply `count` slice rows from `slice` on by four weight rows from `row` on (`valid` of them exist), into out[token][row]. */
INLINE void multiply_tile(const Product *p, size_t slice, size_t row, const size_t count, size_t valid) {
    const uint8_t *w[MAX_ROWS];
    const __m512i flip = _mm512_set1_epi8((char)128); /* flips a signed byte to value + 128, unsigned */
    /* Prefetch the next four rows in memory order, as far ahead as possible without evicting data in use. */
    const char *next = (const char *)p->weight + (row + MAX_ROWS) * p->columns;
    const int near = p->alone && MAX_ROWS * p->columns <= NEAR_BYTES;
#pragma GCC unroll 8
    for (size_t j = 0; j < MAX_ROWS; j++) w[j] = p->weight + (row + smaller(j, valid - 1)) * p->columns;
    __m128 product[MAX_SLICES];
    for (size_t group = 0; group < p->groups; group++) {
        size_t start = p->starts[group], stop = p->starts[group + 1], column = start;
        __m512i acc[MAX_SLICES][MAX_ROWS];
#pragma GCC unroll 8
        for (size_t i = 0; i < count; i++)
#pragma GCC unroll 8
            for (size_t j = 0; j < MAX_ROWS; j++) acc[i][j] = _mm512_setzero_si512();
        const int8_t *s = p->slices + slice * p->padded;
        for (; column + 64 <= stop; column += 64) {
            __m512i byte[MAX_ROWS];
#pragma GCC unroll 8
            for (size_t j = 0; j < MAX_ROWS; j++) {
                if (near) _mm_prefetch(next + (column * MAX_ROWS) + j * 64, _MM_HINT_T0);
                else _mm_prefetch(next + (column * MAX_ROWS) + j * 64, _MM_HINT_T1);
                byte[j] = _mm512_xor_si512(_mm512_loadu_si512(w[j] + column), flip);
            }
#pragma GCC unroll 8
            for (size_t i = 0; i < count; i++) {
                __m512i part = _mm512_loadu_si512(s + i * p->padded + column);
#pragma GCC unroll 8
                for (size_t j = 0; j < MAX_ROWS; j++) add_byte_products(&acc[i][j], byte[j], part);
            }
        }
        if (column < stop) {
            __mmask64 mask = ((__mmask64)1 << (stop - column)) - 1;
#pragma GCC unroll 8
            for (size_t i = 0; i < count; i++) {
                __m512i part = _mm512_maskz_loadu_epi8(mask, s + i * p->padded + column);
#pragma GCC unroll 8
                for (size_t j = 0; j < MAX_ROWS; j++) {
                    __m512i byte = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w[j] + column), flip);
                    add_byte_products(&acc[i][j], byte, part);
                }
            }
        }
        float scales[MAX_ROWS];
        for (size_t j = 0; j < MAX_ROWS; j++) scales[j] = p->scale[(row + smaller(j, valid - 1)) * p->groups + group];
        __m128 scale = _mm_loadu_ps(scales);
#pragma GCC unroll 8
        for (size_t i = 0; i < count; i++) {
            __m128i shift = _mm_set1_epi32(p->sums[(slice + i) * p->groups + group]);
            __m128i sum = _mm_sub_epi32(sum_four_ints(acc[i][0], acc[i][1], acc[i][2], acc[i][3]), shift);
            __m128 scaled = _mm_mul_ps(_mm_cvtepi32_ps(sum), scale);
            product[i] = group ? _mm_add_ps(product[i], scaled) : scaled;
        }
    }
    size_t n = p->num_slices;
    for (size_t first = 0; first < count; first += n) {
        size_t token = (slice + first) / n;
        __m128 total = product[first + n - 1];
        for (size_t k = n - 1; k-- > 0;) total = _mm_add_ps(_mm_div_ps(total, _mm_set1_ps(254.0f)), product[first + k]);
        total = _mm_mul_ps(total, _mm_set1_ps(p->row_scale[token]));
        store_floats(p->out, p->out_dtype, token * p->out_stride + row, _mm512_zextps128_ps512(total), (__mmask16)((1u << valid) - 1));
    }
}

static void multiply_rows(const Product *p, size_t slice, size_t count, size_t first, size_t stop) {
    for (size_t row = first; row < stop; row += MAX_ROWS) {
        size_t valid = smaller(MAX_ROWS, stop - row);
        switch (count) {
            case 1: multiply_tile(p, slice, row, 1, valid); break;
            case 2: multiply_tile(p, slice, row, 2, valid); break;
            case 3: multiply_tile(p, slice, row, 3, valid); break;
            case 4: multiply_tile(p, slice, row, 4, valid); break;
            case 5: multiply_tile(p, slice, row, 5, valid); break;
            default: multiply_tile(p, slice, row, 6, valid); break;
        }
    }
}

/* Number of weight rows that all tokens are multiplied by before moving on. While one tile is multiplied the next is prefetched, so few
   tokens use one tile at a time. The slices of many tokens exceed the L2 cache; then a block of the weight has to fit it instead. */
static size_t rows_a_block(size_t columns, size_t slice_bytes) {
    size_t rows = slice_bytes <= CACHED_BYTES ? 0 : CACHED_BYTES / columns / MAX_ROWS * MAX_ROWS;
    return rows < MAX_ROWS ? MAX_ROWS : rows;
}

static void cut_slices(const void *x, int dtype, size_t columns, size_t padded, size_t groups, const int64_t *starts, size_t num_slices,
                       int8_t *slices, int32_t *sums, float *row_scale) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 odd = 0;
    for (size_t i = 0; i < columns; i += 16) {
        __m512 value = _mm512_abs_ps(load_floats(x, dtype, i, lanes(i, columns)));
        odd |= _mm512_cmp_ps_mask(value, _mm512_set1_ps(3.4028234e38f), _CMP_NLE_UQ);
        most = _mm512_max_ps(most, value);
    }
    float scale = _mm512_reduce_max_ps(most) / 127.0f;
    if (scale < 1e-30f) scale = 1e-30f;
    *row_scale = odd ? NAN : scale;
    for (size_t i = 0; i < padded; i += 16) {
        __m512 left = _mm512_setzero_ps();
        if (i < columns) left = _mm512_div_ps(load_floats(x, dtype, i, lanes(i, columns)), _mm512_set1_ps(scale));
        for (size_t k = 0; k < num_slices; k++) {
            __m512i whole = _mm512_cvtps_epi32(left);
            left = _mm512_mul_ps(_mm512_sub_ps(left, _mm512_cvtepi32_ps(whole)), _mm512_set1_ps(254.0f));
            _mm_storeu_si128((__m128i *)(slices + k * padded + i), _mm512_cvtepi32_epi8(whole));
        }
    }
    for (size_t k = 0; k < num_slices; k++)
        for (size_t group = 0; group < groups; group++) {
            __m512i sum = _mm512_setzero_si512();
            for (int64_t i = starts[group]; i < starts[group + 1]; i += 64) {
                int64_t left = starts[group + 1] - i;
                __mmask64 mask = left >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8((char)128), _mm512_maskz_loadu_epi8(mask, slices + k * padded + i));
            }
            sums[k * groups + group] = _mm512_reduce_add_epi32(sum);
        }
}

static _Thread_local void *kept;
static _Thread_local size_t kept_bytes;

/* out [tokens, rows] = x [tokens, columns] times weight [rows, columns] with scale [rows, groups].

   x is float32, bfloat16 or float16, decomposed into `num_slices` (1 to 3) of 8 bits. If `num_slices` is 0, x is int8 and is multiplied
   directly. Returns 0, or 1 when out of memory. */
int tandem_int8_linear(const void *x, int dtype, size_t tokens, size_t columns, const uint8_t *weight, size_t rows,
                       const float *scale, const int64_t *starts, size_t groups, size_t num_slices, void *out, int out_dtype,
                       size_t out_stride, int threads) {
    size_t padded = (columns + 63) / 64 * 64, slices = num_slices ? num_slices : 1;
    size_t slice_bytes = tokens * slices * padded, sum_bytes = (tokens * slices * groups * 4 + 63) / 64 * 64;
    char *memory = keep_bytes(&kept, &kept_bytes, slice_bytes + sum_bytes + tokens * 4);
    if (!memory) return 1;
    int32_t *sums = (int32_t *)(memory + slice_bytes);
    float *row_scale = (float *)(memory + slice_bytes + sum_bytes);
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 4)
    for (size_t token = 0; token < tokens; token++) {
        int8_t *mine = (int8_t *)memory + token * slices * padded;
        int32_t *my_sums = sums + token * slices * groups;
        if (num_slices) {
            const char *row = (const char *)x + token * columns * item_bytes(dtype);
            cut_slices(row, dtype, columns, padded, groups, starts, num_slices, mine, my_sums, row_scale + token);
            continue;
        }
        const int8_t *row = (const int8_t *)x + token * columns;
        for (size_t i = 0; i < padded; i++) mine[i] = i < columns ? row[i] : 0;
        for (size_t group = 0; group < groups; group++) {
            int32_t sum = 0;
            for (int64_t i = starts[group]; i < starts[group + 1]; i++) sum += row[i];
            my_sums[group] = 128 * sum;
        }
        row_scale[token] = 1.0f;
    }
    Product p = {(int8_t *)memory, sums, row_scale, padded, weight, scale, starts, columns, groups, slices, out, out_stride, out_dtype,
                 tokens * slices <= MAX_SLICES};
    size_t at_once = MAX_SLICES / slices * slices, total = tokens * slices, block = rows_a_block(columns, slice_bytes);
    size_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        size_t first = smaller(tiles * thread / threads * MAX_ROWS, rows), stop = smaller(tiles * (thread + 1) / threads * MAX_ROWS, rows);
        for (size_t row = first; row < stop; row += block)
            for (size_t slice = 0; slice < total; slice += at_once)
                multiply_rows(&p, slice, smaller(at_once, total - slice), row, smaller(row + block, stop));
    }
    return 0;
}
