/* The functions called from Python and from `layers.c`; documented where they are defined. */
#ifndef TANDEM_KERNELS_H
#define TANDEM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* What is done to the inputs of an integer linear before they are multiplied. */
typedef struct {
    size_t num_slices;        /* 8-bit slices of each element: 1 (8-bit activations) to 3; 0: the inputs are int8 */
    const float *divisor;     /* [columns]: divides the inputs first; NULL: none */
    const int64_t *order;     /* [columns]: input column of each column of the weight; NULL: the same */
    float scale;              /* of static 8-bit activations; 0: one a token */
    float zero_point;         /* of static 8-bit activations */
    const float *correction;  /* [rows]: what the zero point adds to each result; NULL: none */
} Inputs;

int tandem_int8_linear(const void *x, int dtype, size_t tokens, size_t columns, const int8_t *weight, size_t rows,
                       const float *scale, const int64_t *starts, size_t groups, const Inputs *inputs, void *out, int out_dtype,
                       size_t out_stride, int threads);
int tandem_int4_linear(const void *x, int dtype, size_t tokens, size_t columns, const uint8_t *packed, size_t rows, const float *scale,
                       const int8_t *zeros, const int64_t *starts, size_t groups, const Inputs *inputs, void *out, int out_dtype,
                       size_t out_stride, int threads);
int tandem_pack_int4(const int8_t *weight, size_t rows, size_t columns, const int64_t *starts, size_t groups, uint8_t *packed,
                     int8_t *zeros, int threads);
void tandem_float_linear(const void *x, int dtype, size_t tokens, size_t columns, const void *weight, size_t rows, void *out,
                         size_t out_stride, int threads);
int64_t tandem_load_word(const int64_t *word);
void tandem_store_word(int64_t *word, int64_t value);
void tandem_rms_norm(void *hidden, const void *delta, const void *weight, void *out, int dtype, size_t tokens, size_t size, float epsilon,
                     int threads);
void tandem_silu_multiply(const void *gate_up, void *out, int dtype, size_t tokens, size_t size, int threads);
int tandem_attend(void *rows, int dtype, size_t tokens, size_t heads, size_t kv_heads, size_t head_dim, const float *cosine, const float *sine,
                  void *cache, float *token_scales, const float *fixed_scales, size_t block_size, const int64_t *spans, size_t num_spans,
                  const int64_t *blocks, size_t window, float softcap, void *out, int threads);

#endif
