/* Shared building blocks of the kernels: element types, loading and storing vectors, sums of a vector in a fixed order, exp.

   Every kernel computes each row independently and in a fixed order, so results do not depend on the batch, the threads, or the split of
   a weight. Requires AVX-512 with VNNI and BF16; `supported.c` checks for it. */
#ifndef TANDEM_VECTORS_H
#define TANDEM_VECTORS_H

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

INLINE size_t item_bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* Mask of the lanes of a 16-lane vector that starts at `first` of `count`. */
INLINE __mmask16 lanes(size_t first, size_t count) {
    return count - first >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (count - first)) - 1);
}

/* Load 16 elements from `index` on as float32; masked-out lanes are 0 and are not accessed. */
INLINE __m512 load_floats(const void *data, int dtype, size_t index, __mmask16 mask) {
    if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)data + index);
    const uint16_t *from = (const uint16_t *)data + index;
    __m256i half = mask == 0xffff ? _mm256_loadu_si256((const __m256i *)from) : _mm256_maskz_loadu_epi16(mask, from);
    if (dtype == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Round to the nearest bfloat16, ties to even, preserving denormals and NaN: as PyTorch rounds. */
INLINE __m256i to_bfloat16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE void store_floats(void *data, int dtype, size_t index, __m512 value, __mmask16 mask) {
    if (dtype == FLOAT32) {
        _mm512_mask_storeu_ps((float *)data + index, mask, value);
    } else {
        __m256i half = dtype == BFLOAT16 ? to_bfloat16(value) : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        uint16_t *to = (uint16_t *)data + index;
        /* Masked 16-bit stores are microcoded on Zen 4, so full vectors use a plain store. */
        if (mask == 0xffff) _mm256_storeu_si256((__m256i *)to, half);
        else _mm256_mask_storeu_epi16(to, mask, half);
    }
}

/* Round float32 values as storing them as `dtype` would. */
INLINE __m512 round_floats(__m512 value, int dtype) {
    if (dtype == FLOAT32) return value;
    if (dtype == FLOAT16) return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bfloat16(value)), 16));
}

/* sum += dot products of unsigned and signed bytes, or of bfloat16 pairs. Inline assembly, since GCC 12 duplicates every accumulator of
   the intrinsics, which halves the speed. */
INLINE void add_byte_products(__m512i *sum, __m512i bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(bytes), "v"(signed_bytes));
}

INLINE void add_pair_products(__m512 *sum, __m512i a, __m512i b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b)); }

/* The sums of four vectors, as one vector. */
INLINE __m128i sum_four_ints(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

INLINE __m128 sum_four_floats(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 all = _mm512_add_ps(low, high);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

INLINE float sum_floats(__m512 a) {
    __m512 none = _mm512_setzero_ps();
    return _mm_cvtss_f32(sum_four_floats(a, none, none, none));
}

/* Transpose 16 rows to 16 columns. */
INLINE void transpose(__m512 row[16]) {
    __m512 pair[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 4) {
        __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(row[i], row[i + 1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(row[i], row[i + 1]));
        __m512d d = _mm512_castps_pd(_mm512_unpacklo_ps(row[i + 2], row[i + 3])), e = _mm512_castps_pd(_mm512_unpackhi_ps(row[i + 2], row[i + 3]));
        pair[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, d));
        pair[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, d));
        pair[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, e));
        pair[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, e));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 a = _mm512_shuffle_f32x4(pair[i], pair[i + 4], 0x88), b = _mm512_shuffle_f32x4(pair[i], pair[i + 4], 0xdd);
        __m512 d = _mm512_shuffle_f32x4(pair[i + 8], pair[i + 12], 0x88), e = _mm512_shuffle_f32x4(pair[i + 8], pair[i + 12], 0xdd);
        row[i] = _mm512_shuffle_f32x4(a, d, 0x88);
        row[i + 8] = _mm512_shuffle_f32x4(a, d, 0xdd);
        row[i + 4] = _mm512_shuffle_f32x4(b, e, 0x88);
        row[i + 12] = _mm512_shuffle_f32x4(b, e, 0xdd);
    }
}

/* exp, within 1.5 ulp; exactly 1 at 0, 0 below -87 (masked scores), NaN is preserved. Coefficients: Cephes. */
INLINE __m512 exp_floats(__m512 x) {
    __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLE_UQ);
    x = _mm512_min_ps(_mm512_set1_ps(88.72f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(kept, p, n);
}

/* Per-thread buffer, kept for the next call and not touched in between. NULL when out of memory. */
INLINE void *keep_bytes(void **kept, size_t *size, size_t wanted) {
    if (!*kept || *size < wanted) {
        free(*kept);
        *kept = aligned_alloc(64, wanted / 64 * 64 + 64);
        *size = *kept ? wanted : 0;
    }
    return *kept;
}

#endif
