/* Many tokens times an int8 weight: the products of int8_linear.c, bit for bit.

   A thread rearranges a block of the weight that fits the L2 cache into panels of 16 rows, each lane of a vector one row, so that no sum
   crosses lanes. A line of a panel is 64 bytes: one 32-bit word of consecutive columns for each row. The work pays off over the tokens. */
#include "int8_product.h"

#ifdef HAS_PANELS

enum { LANES = 16, LINE_BYTES = 64, BLOCK_BYTES = 256 << 10 };

static _Thread_local void *kept_panels, *kept_words;
static _Thread_local size_t kept_panel_bytes, kept_word_bytes;

typedef struct {
    const Product *product;
    const panel_slice *slices; /* [slices][padded] */
    size_t rows, lines;        /* lines of a panel, over all groups */
} Panels;

static size_t count_lines(size_t columns) {
    return (columns + PANEL_COLUMNS * PANEL_LINES - 1) / (PANEL_COLUMNS * PANEL_LINES) * PANEL_LINES;
}

/* Pack the 16 rows from `row` on, those past the end as copies of the last, and their scales [groups][16]. */
static void pack_panel(const Panels *p, size_t row, uint8_t *panel, float *scales) {
    const Product *q = p->product;
    const int8_t *from[LANES];
    size_t last = p->rows - 1;
    for (size_t i = 0; i < LANES; i++) from[i] = q->weight + smaller(row + i, last) * q->columns;
    for (size_t group = 0; group < q->groups; group++) {
        size_t start = q->starts[group], stop = q->starts[group + 1], lines = count_lines(stop - start);
        for (size_t column = start; column < stop; column += PACKED_COLUMNS)
            pack_lines(from, column, smaller(PACKED_COLUMNS, stop - column), PANEL_OFFSET,
                       panel + (column - start) / PANEL_COLUMNS * LINE_BYTES);
        panel += lines * LINE_BYTES;
        for (size_t i = 0; i < LANES; i++) scales[group * LANES + i] = q->scale[smaller(row + i, last) * q->groups + group];
    }
}

/* Multiply `count` slices from `slice` on, of which `valid` exist, by the panels of the rows from `row` on. */
INLINE void multiply_panels(const Panels *p, size_t slice, size_t row, const size_t count, size_t valid, const uint8_t *const first[PANELS_AT_ONCE],
                            const float *const scales[PANELS_AT_ONCE], size_t panels) {
    const Product *q = p->product;
    const uint8_t *panel[PANELS_AT_ONCE];
    for (size_t j = 0; j < PANELS_AT_ONCE; j++) panel[j] = first[j];
    floats product[PANELS_AT_ONCE][PANEL_SLICES];
    for (size_t group = 0; group < q->groups; group++) {
        size_t start = q->starts[group], lines = count_lines(q->starts[group + 1] - start);
        ints sums[PANELS_AT_ONCE][PANEL_SLICES];
#pragma GCC unroll 4
        for (size_t j = 0; j < PANELS_AT_ONCE; j++)
#pragma GCC unroll 16
            for (size_t i = 0; i < count; i++) sums[j][i] = spread_int(0);
        multiply_lines(sums, count, panel, p->slices + slice * q->padded + start, q->padded, lines);
#pragma GCC unroll 4
        for (size_t j = 0; j < PANELS_AT_ONCE; j++) {
            panel[j] += lines * LINE_BYTES;
            floats scale = load(scales[j] + group * LANES);
#pragma GCC unroll 16
            for (size_t i = 0; i < count; i++) {
                int32_t shift = PANEL_OFFSET && i < valid ? PANEL_OFFSET * q->sums[(slice + i) * q->groups + group] : 0;
                floats scaled = multiply(to_floats(subtract_ints(sums[j][i], spread_int(shift))), scale);
                product[j][i] = group ? add(product[j][i], scaled) : scaled;
            }
        }
    }
    size_t n = q->num_slices;
    for (size_t j = 0; j < panels; j++) {
        size_t at = row + j * LANES, used = lanes(at, p->rows);
        for (size_t i = 0; i < valid; i += n) {
            size_t token = (slice + i) / n;
            floats total = product[j][i + n - 1];
            for (size_t k = n - 1; k-- > 0;) total = add(divide(total, spread(254.0f)), product[j][i + k]);
            if (q->correction) total = subtract(total, load_part(q->correction + at, used, spread(0.0f)));
            store_floats(q->out, q->out_dtype, token * q->out_stride + at, multiply(total, spread(q->row_scale[token])), used);
        }
    }
}

/* Multiply all slices by `count` panels packed from the rows from `row` on. */
static void multiply_block(const Panels *p, size_t total, size_t row, size_t count, const uint8_t *panels, const float *scales) {
    const Product *q = p->product;
    const size_t at_once = PANEL_SLICES / q->num_slices * q->num_slices;
    for (size_t slice = 0; slice < total; slice += at_once) {
        size_t valid = smaller(at_once, total - slice);
        for (size_t panel = 0; panel < count; panel += PANELS_AT_ONCE) {
            const uint8_t *first[PANELS_AT_ONCE];
            const float *scale[PANELS_AT_ONCE];
            for (size_t j = 0; j < PANELS_AT_ONCE; j++) {
                size_t index = smaller(panel + j, count - 1);
                first[j] = panels + index * p->lines * LINE_BYTES, scale[j] = scales + index * q->groups * LANES;
            }
            size_t there = smaller(PANELS_AT_ONCE, count - panel), at = row + panel * LANES;
            if (valid <= PANEL_SLICES / 3) multiply_panels(p, slice, at, PANEL_SLICES / 3, valid, first, scale, there);
            else if (valid <= PANEL_SLICES / 3 * 2) multiply_panels(p, slice, at, PANEL_SLICES / 3 * 2, valid, first, scale, there);
            else multiply_panels(p, slice, at, PANEL_SLICES, valid, first, scale, there);
        }
    }
}

/* The slices in the form that panels are multiplied by; NULL when out of memory. */
static const panel_slice *widen_slices(const Product *q, size_t total, int threads) {
    if (sizeof(panel_slice) == 1) return (const panel_slice *)q->slices;
    panel_slice *words = keep_bytes(&kept_words, &kept_word_bytes, (total + SPARE_SLICES) * q->padded * sizeof(panel_slice));
    if (!words) return NULL;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (size_t slice = 0; slice < total; slice++)
        for (size_t i = 0; i < q->padded; i++) words[slice * q->padded + i] = q->slices[slice * q->padded + i];
    return words;
}

int multiply_in_panels(const Product *q, size_t total, size_t rows, int threads) {
    Panels p = {q, widen_slices(q, total, threads), rows, 0};
    if (!p.slices) return 1;
    for (size_t group = 0; group < q->groups; group++) p.lines += count_lines(q->starts[group + 1] - q->starts[group]);
    size_t tiles = (rows + LANES - 1) / LANES, panel_bytes = p.lines * LINE_BYTES;
    size_t block = BLOCK_BYTES / panel_bytes / PANELS_AT_ONCE * PANELS_AT_ONCE;
    if (block < PANELS_AT_ONCE) block = PANELS_AT_ONCE;
    int failed = 0;
#pragma omp parallel for num_threads(threads) reduction(| : failed) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        size_t first = tiles * thread / threads, stop = tiles * (thread + 1) / threads;
        size_t scale_bytes = q->groups * LANES * 4, spare = PACKED_COLUMNS / PANEL_COLUMNS * LINE_BYTES;
        uint8_t *panels = keep_bytes(&kept_panels, &kept_panel_bytes, block * (panel_bytes + scale_bytes) + spare);
        if (!panels) {
            failed = 1;
            continue;
        }
        float *scales = (float *)(panels + block * panel_bytes + spare);
        open_panels();
        for (size_t tile = first; tile < stop; tile += block) {
            size_t count = smaller(block, stop - tile);
            for (size_t i = 0; i < count; i++)
                pack_panel(&p, (tile + i) * LANES, panels + i * panel_bytes, scales + i * q->groups * LANES);
            multiply_block(&p, total, tile * LANES, count, panels, scales);
        }
        close_panels();
    }
    return failed;
}

#endif
