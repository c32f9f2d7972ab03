/* Runs every kernel on the same made-up inputs and prints a hash of each result: equal for all instruction sets.

   Compiled with the kernels for one instruction set (test_instruction_sets.py), also for other machines under an emulator. */
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int tandem_supported(void);

static uint32_t state = 1;

static uint32_t next_bits(void) { return state = state * 1664525u + 1013904223u, state >> 8; }

static float next_float(void) { return ((int)(next_bits() & 0xffff) - 0x8000) / 4096.0f; }

static void *make(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 127) / 64 * 64);
    memset(memory, 0, (bytes + 127) / 64 * 64);
    return memory;
}

/* `count` values of a type; values with few digits, so that conversions to 16 bits are exact where they are given in 16 bits. */
static void *make_values(int dtype, size_t count, float factor) {
    char *values = make(count * 4);
    for (size_t i = 0; i < count; i++) {
        float value = next_float() * factor;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (dtype == 0) memcpy(values + 4 * i, &value, 4);
        if (dtype == 1) memcpy(values + 2 * i, (char *)&bits + 2, 2);
        if (dtype == 2) {
            uint16_t half = (uint16_t)(0x3000 + (next_bits() & 0xfff) + (next_bits() & 1 ? 0x8000 : 0));
            memcpy(values + 2 * i, &half, 2);
        }
    }
    return values;
}

static void report(const char *name, int dtype, size_t a, size_t b, const void *data, size_t bytes) {
    uint64_t hash = 1469598103934665603u;
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    printf("%s %d %zu %zu %016llx\n", name, dtype, a, b, (unsigned long long)hash);
}

static void run_linears(size_t tokens, size_t columns, size_t rows, size_t group) {
    size_t groups = (columns + group - 1) / group, tiles = (rows + 15) / 16, steps = 0;
    int64_t *starts = make((groups + 1) * 8);
    for (size_t i = 0; i <= groups; i++) starts[i] = i * group < columns ? i * group : columns;
    for (size_t i = 0; i < groups; i++) steps += (starts[i + 1] - starts[i] + 7) / 8;
    int8_t *weight = make(rows * columns), *nibbles = make(rows * columns), *zeros = make(tiles * groups * 16);
    uint8_t *packed = make(tiles * steps * 64);
    float *scale = make(rows * groups * 4), *tiled = make(tiles * groups * 64);
    for (size_t i = 0; i < rows * columns; i++) weight[i] = (int8_t)next_bits(), nibbles[i] = (int8_t)(next_bits() % 16) - 8 + (i / columns) % 3;
    for (size_t row = 0; row < rows; row++)
        for (size_t g = 0; g < groups; g++)
            tiled[(row / 16 * groups + g) * 16 + row % 16] = scale[row * groups + g] = 0.001f * (1 + next_bits() % 100);
    if (tandem_pack_int4(nibbles, rows, columns, starts, groups, packed, zeros, 1)) exit(2);
    char *out = make(tokens * rows * 4), *same = make(tokens * rows * 4);
    for (int dtype = 0; dtype < 3; dtype++)
        for (size_t num_slices = 0; num_slices <= 3; num_slices++) {
            size_t bytes = tokens * rows * (dtype == 0 ? 4 : 2);
            Inputs inputs = {num_slices, NULL, NULL, 0, 0, NULL};
            void *x = num_slices ? make_values(dtype, tokens * columns, 1) : (void *)weight;
            if (!num_slices && tokens > rows) continue;
            tandem_int8_linear(x, dtype, tokens, columns, weight, rows, scale, starts, groups, &inputs, out, dtype, rows, 1);
            report("int8_linear", dtype, num_slices, columns, out, bytes);
            tandem_int8_linear(x, dtype, tokens, columns, nibbles, rows, scale, starts, groups, &inputs, same, dtype, rows, 1);
            tandem_int4_linear(x, dtype, tokens, columns, packed, rows, tiled, zeros, starts, groups, &inputs, out, dtype, rows, 1);
            if (memcmp(out, same, bytes)) printf("int4_linear differs from int8_linear: %d %zu %zu\n", dtype, num_slices, columns);
            report("int4_linear", dtype, num_slices, columns, out, bytes);
        }
    float *divisor = make(columns * 4), *correction = make(rows * 4);
    int64_t *order = make(columns * 8);
    for (size_t i = 0; i < columns; i++) divisor[i] = 0.5f + next_bits() % 8, order[i] = columns - 1 - i;
    for (size_t i = 0; i < rows; i++) correction[i] = next_float();
    const Inputs treated[] = {{3, divisor, NULL, 0, 0, NULL}, {2, NULL, order, 0, 0, NULL}, {1, divisor, NULL, 0, 0, NULL},
                              {1, divisor, NULL, 0.05f, 3, correction}, {1, NULL, NULL, 0.05f, -7, correction}};
    for (size_t i = 0; i < sizeof treated / sizeof *treated; i++)
        for (int dtype = 0; dtype < 3; dtype++) {
            void *x = make_values(dtype, tokens * columns, 1);
            tandem_int8_linear(x, dtype, tokens, columns, weight, rows, scale, starts, groups, &treated[i], out, dtype, rows, 1);
            report("treated", dtype, i, columns, out, tokens * rows * (dtype == 0 ? 4 : 2));
        }
    for (int dtype = 0; dtype < 3; dtype++) {
        void *x = make_values(dtype, tokens * columns, 1), *w = make_values(dtype, rows * columns, 1);
        tandem_float_linear(x, dtype, tokens, columns, w, rows, out, rows, 1);
        report("float_linear", dtype, tokens, columns, out, tokens * rows * (dtype == 0 ? 4 : 2));
    }
}

static void run_steps(size_t tokens, size_t size) {
    for (int dtype = 0; dtype < 3; dtype++) {
        size_t item = dtype == 0 ? 4 : 2;
        void *hidden = make_values(dtype, tokens * size, 1), *delta = make_values(dtype, tokens * size, 1), *weight = make_values(dtype, size, 1);
        char *out = make(tokens * size * item);
        tandem_rms_norm(hidden, delta, weight, out, dtype, tokens, size, 1e-5f, 1);
        report("rms_norm", dtype, tokens, size, out, tokens * size * item);
        void *gates = make_values(dtype, tokens * size * 2, dtype == 2 ? 1 : 20);
        tandem_silu_multiply(gates, out, dtype, tokens, size, 1);
        report("silu_multiply", dtype, tokens, size, out, tokens * size * item);
    }
}

/* Two sequences: one of 70 new tokens, one with a new token after 69 earlier ones. `kind` 0: a float cache; 1, 2: int8. */
static void run_attention(size_t heads, size_t kv_heads, size_t head_dim, int kind, size_t window, float softcap) {
    enum { BLOCK = 16, BLOCKS = 10, TOKENS = 71 };
    for (int dtype = 0; dtype < 3; dtype++) {
        size_t width = (heads + 2 * kv_heads) * head_dim, item = dtype == 0 ? 4 : 2;
        void *rows = make_values(dtype, TOKENS * width, 0.25f), *cosine = make_values(0, TOKENS * head_dim, 0.1f);
        void *sine = make_values(0, TOKENS * head_dim, 0.1f);
        size_t places = BLOCKS * 2 * kv_heads * BLOCK;
        char *cache = make(places * head_dim * item);
        float *token_scales = make(places * 4), *fixed = make(2 * kv_heads * head_dim * 4);
        for (size_t i = 0; i < places; i++) token_scales[i] = 0.01f;
        for (size_t i = 0; i < 2 * kv_heads * head_dim; i++) fixed[i] = 0.01f + 0.0001f * (next_bits() % 100);
        for (size_t i = 0; i < places * head_dim; i++) {
            if (kind) cache[i] = (char)next_bits();
            else if (dtype == 0) ((float *)cache)[i] = next_float();
            else ((uint16_t *)cache)[i] = 0x3c00;
        }
        int64_t spans[6] = {0, 0, 0, 70, 69, 5}, blocks[BLOCKS] = {0, 2, 4, 6, 8, 1, 3, 5, 7, 9};
        char *out = make(TOKENS * heads * head_dim * item);
        if (tandem_attend(rows, dtype, TOKENS, heads, kv_heads, head_dim, cosine, sine, cache, kind == 1 ? token_scales : NULL,
                          kind == 2 ? fixed : NULL, BLOCK, spans, 2, blocks, window, softcap, out, 1))
            exit(2);
        report(kind ? "attend" : "attend_float", dtype, heads * 1000 + head_dim, kind + 10 * window, out, TOKENS * heads * head_dim * item);
        report("cache", dtype, heads * 1000 + head_dim, kind, cache, places * head_dim * (kind ? 1 : item));
    }
}

int main(void) {
    if (!tandem_supported()) return printf("this CPU does not support the instruction set\n"), 3;
    run_linears(1, 64, 8, 64), run_linears(3, 200, 37, 48), run_linears(7, 512, 33, 128), run_linears(5, 96, 16, 32), run_linears(9, 1003, 20, 1003);
    run_linears(150, 203, 37, 50), run_linears(64, 72, 160, 24), run_linears(129, 1003, 33, 1003);
    run_steps(3, 64), run_steps(2, 100), run_steps(1, 1003);
    for (int kind = 0; kind < 3; kind++) {
        run_attention(4, 2, 64, kind, 0, 0), run_attention(5, 1, 40, kind, 0, 0), run_attention(3, 3, 128, kind, 0, 0);
        run_attention(4, 2, 64, kind, 9, 0), run_attention(5, 1, 40, kind, 65, 2), run_attention(1, 1, 16, kind, 1, 0.5f);
    }
    return 0;
}
