/* The elementwise steps between a layer's matmuls, each in one pass over its rows: residual add with norm, SiLU and multiply. */
#include "kernels.h"
#include "vectors.h"

/* RMSNorm. If `delta` is given, hidden += delta first, rounded and stored. out = round(hidden / rms) * weight, rounded. */
void tandem_rms_norm(void *hidden, const void *delta, const void *weight, void *out, int dtype, size_t tokens, size_t size, float epsilon,
                     int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 4)
    for (size_t token = 0; token < tokens; token++) {
        size_t first = token * size;
        __m512 squares = _mm512_setzero_ps();
        for (size_t i = 0; i < size; i += 16) {
            __mmask16 mask = lanes(i, size);
            __m512 value = load_floats(hidden, dtype, first + i, mask);
            if (delta) {
                value = round_floats(_mm512_add_ps(value, load_floats(delta, dtype, first + i, mask)), dtype);
                store_floats(hidden, dtype, first + i, value, mask);
            }
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        __m512 factor = _mm512_set1_ps(1.0f / sqrtf(sum_floats(squares) / (float)size + epsilon));
        for (size_t i = 0; i < size; i += 16) {
            __mmask16 mask = lanes(i, size);
            __m512 normed = round_floats(_mm512_mul_ps(load_floats(hidden, dtype, first + i, mask), factor), dtype);
            store_floats(out, dtype, first + i, _mm512_mul_ps(normed, load_floats(weight, dtype, i, mask)), mask);
        }
    }
}

/* out [tokens, size] = silu(gate) * up, where gate_up is [tokens, gate then up]. */
void tandem_silu_multiply(const void *gate_up, void *out, int dtype, size_t tokens, size_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 4)
    for (size_t token = 0; token < tokens; token++)
        for (size_t i = 0; i < size; i += 16) {
            __mmask16 mask = lanes(i, size);
            __m512 gate = load_floats(gate_up, dtype, token * 2 * size + i, mask);
            __m512 up = load_floats(gate_up, dtype, token * 2 * size + size + i, mask);
            __m512 one = _mm512_set1_ps(1.0f);
            __m512 low = _mm512_sub_ps(_mm512_setzero_ps(), gate);
            __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(exp_floats(low), one));
            store_floats(out, dtype, token * size + i, _mm512_mul_ps(silu, up), mask);
        }
}
