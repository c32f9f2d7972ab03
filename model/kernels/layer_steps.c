/* The elementwise steps between a layer's matmuls, each in one pass over its rows: residual add with norm, SiLU and multiply. */
#include "kernels.h"
#include "vectors.h"

/* RMSNorm. If `delta` is given, hidden += delta first, rounded and stored. out = round(hidden / rms) * weight, rounded. */
void tandem_rms_norm(void *hidden, const void *delta, const void *weight, void *out, int dtype, size_t tokens, size_t size, float epsilon,
                     int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 4)
    for (size_t token = 0; token < tokens; token++) {
        size_t first = token * size;
        floats squares = spread(0.0f);
        for (size_t i = 0; i < size; i += 16) {
            size_t count = lanes(i, size);
            floats value = load_floats(hidden, dtype, first + i, count);
            if (delta) {
                value = round_floats(add(value, load_floats(delta, dtype, first + i, count)), dtype);
                store_floats(hidden, dtype, first + i, value, count);
            }
            squares = fused(value, value, squares);
        }
        floats factor = spread(1.0f / sqrtf(sum_floats(squares) / (float)size + epsilon));
        for (size_t i = 0; i < size; i += 16) {
            size_t count = lanes(i, size);
            floats normed = round_floats(multiply(load_floats(hidden, dtype, first + i, count), factor), dtype);
            store_floats(out, dtype, first + i, multiply(normed, load_floats(weight, dtype, i, count)), count);
        }
    }
}

/* out [tokens, size] = silu(gate) * up, where gate_up is [tokens, gate then up]. */
void tandem_silu_multiply(const void *gate_up, void *out, int dtype, size_t tokens, size_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 4)
    for (size_t token = 0; token < tokens; token++)
        for (size_t i = 0; i < size; i += 16) {
            size_t count = lanes(i, size);
            floats gate = load_floats(gate_up, dtype, token * 2 * size + i, count);
            floats up = load_floats(gate_up, dtype, token * 2 * size + size + i, count);
            floats one = spread(1.0f);
            floats low = subtract(spread(0.0f), gate);
            floats silu = divide(gate, add(exp_floats(low), one));
            store_floats(out, dtype, token * size + i, multiply(silu, up), count);
        }
}
