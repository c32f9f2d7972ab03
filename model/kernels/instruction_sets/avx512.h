/* AVX-512 with VNNI: 16 floats in one register; with AVX-512 BF16 also products of bfloat16 pairs. See README.md. */
#include <immintrin.h>

typedef __m512 floats;
typedef __m512i ints;

INLINE __mmask16 first_lanes(size_t count) { return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1); }

INLINE floats spread(float value) { return _mm512_set1_ps(value); }
INLINE floats load(const float *from) { return _mm512_load_ps(from); }
INLINE void store(float *to, floats value) { _mm512_store_ps(to, value); }
INLINE floats load_near(const float *from) { return _mm512_loadu_ps(from); }
INLINE floats load_part(const float *from, size_t count, floats other) { return _mm512_mask_loadu_ps(other, first_lanes(count), from); }

INLINE floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
INLINE floats subtract(floats a, floats b) { return _mm512_sub_ps(a, b); }
INLINE floats multiply(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats divide(floats a, floats b) { return _mm512_div_ps(a, b); }
INLINE floats fused(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats negative_fused(floats a, floats b, floats c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE floats minimum(floats a, floats b) { return _mm512_min_ps(a, b); }
INLINE floats maximum(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE floats absolute(floats a) { return _mm512_abs_ps(a); }
INLINE float largest(floats a) { return _mm512_reduce_max_ps(a); }

INLINE floats maximum_bits(floats a, floats b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
INLINE float largest_bits(floats a) {
    return _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(_mm512_castps_si512(a)))));
}
INLINE int any_above(floats a, float limit) { return _mm512_cmp_ps_mask(a, _mm512_set1_ps(limit), _CMP_NLE_UQ) != 0; }

INLINE floats zero_below(floats x, float limit, floats value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLE_UQ), value);
}
INLINE floats round_whole(floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE floats times_power_of_two(floats a, floats exponent) { return _mm512_scalef_ps(a, exponent); }

INLINE ints to_ints(floats a) { return _mm512_cvtps_epi32(a); }
INLINE floats to_floats(ints a) { return _mm512_cvtepi32_ps(a); }
INLINE ints spread_int(int32_t value) { return _mm512_set1_epi32(value); }
INLINE ints subtract_ints(ints a, ints b) { return _mm512_sub_epi32(a, b); }
INLINE ints add_ints(ints a, ints b) { return _mm512_add_epi32(a, b); }
INLINE ints multiply_ints(ints a, ints b) { return _mm512_mullo_epi32(a, b); }
INLINE ints load_ints(const int32_t *from) { return _mm512_load_si512(from); }

INLINE floats load_bytes(const int8_t *from, size_t count) {
    __m128i bytes = count >= 16 ? _mm_loadu_si128((const __m128i *)from) : _mm_maskz_loadu_epi8(first_lanes(count), from);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
INLINE void store_bytes(int8_t *to, ints value, size_t count) {
    if (count >= 16) _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(value));
    else _mm_mask_storeu_epi8(to, first_lanes(count), _mm512_cvtepi32_epi8(value));
}

INLINE floats load_floats(const void *data, int dtype, size_t index, size_t count) {
    __mmask16 mask = first_lanes(count);
    if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)data + index);
    const uint16_t *from = (const uint16_t *)data + index;
    __m256i half = mask == 0xffff ? _mm256_loadu_si256((const __m256i *)from) : _mm256_maskz_loadu_epi16(mask, from);
    if (dtype == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* The first, or second, values of 16 pairs of bfloat16. */
INLINE floats load_firsts(const uint16_t *from) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(from), 16)); }
INLINE floats load_seconds(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi32((int)0xffff0000u)));
}

/* Round to the nearest bfloat16, ties to even, preserving denormals and NaN: as PyTorch rounds. */
INLINE __m256i to_bfloat16(floats value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE void store_floats(void *data, int dtype, size_t index, floats value, size_t count) {
    __mmask16 mask = first_lanes(count);
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

/* Store the first `count` of four results. */
INLINE void store_four(void *data, int dtype, size_t index, four_floats value, size_t count) {
    store_floats(data, dtype, index, _mm512_zextps128_ps512((__m128)value), count);
}

INLINE floats round_floats(floats value, int dtype) {
    if (dtype == FLOAT32) return value;
    if (dtype == FLOAT16) return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bfloat16(value)), 16));
}

INLINE four_floats sum_four_floats(floats a, floats b, floats c, floats d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    __m512 all = _mm512_add_ps(low, high);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return (four_floats)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

INLINE void transpose(floats row[16]) {
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

/* sum += dot products of unsigned and signed bytes, or of bfloat16 pairs. Inline assembly, since GCC 12 duplicates every accumulator of
   the intrinsics, which halves the speed. */
INLINE void add_byte_products(__m512i *sum, __m512i bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(bytes), "v"(signed_bytes));
}

/* Integer products of int8_linear.c. */
#define INT_SLICES 6
enum { WIDTH = 64, WEIGHT_OFFSET = 128, INT_ROWS = 4 };
typedef __m512i int_sums, weights, slices;

INLINE int_sums no_sums(void) { return _mm512_setzero_si512(); }
INLINE __mmask64 first_bytes(size_t count) { return ((__mmask64)1 << count) - 1; }
/* A flipped sign bit makes a signed byte unsigned and larger by WEIGHT_OFFSET. */
INLINE weights flip(__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8((char)128)); }
INLINE weights load_weights(const int8_t *from) { return flip(_mm512_loadu_si512(from)); }
INLINE weights load_weights_part(const int8_t *from, size_t count) { return flip(_mm512_maskz_loadu_epi8(first_bytes(count), from)); }
INLINE slices load_slices(const int8_t *from) { return _mm512_loadu_si512(from); }
INLINE slices load_slices_part(const int8_t *from, size_t count) { return _mm512_maskz_loadu_epi8(first_bytes(count), from); }
INLINE void add_products(int_sums *sum, weights weight, slices slice) { add_byte_products(sum, weight, slice); }

INLINE four_ints sum_four_ints(int_sums a, int_sums b, int_sums c, int_sums d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return (four_ints)_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

INLINE int32_t sum_bytes(const int8_t *from, size_t count) {
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = 0; i < count; i += 64) {
        __mmask64 mask = count - i >= 64 ? ~(__mmask64)0 : first_bytes(count - i);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(mask, from + i));
    }
    return _mm512_reduce_add_epi32(sum);
}

/* Products of int4_linear.c: 16 rows of 8 columns are 64 bytes, 4 bytes a row: low nibbles the first 4 columns, high nibbles the others. */
#define NIBBLE_SLICES 8

typedef struct { int8_t bytes[4]; } word;
INLINE void add_word_products(__m512i *sum, __m512i bytes, const int8_t *from) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(bytes), "m"(*(const word *)from));
}

INLINE void add_nibble_products(ints *sums, const size_t count, const uint8_t *packed, const int8_t *slice, size_t stride, size_t steps) {
    const __m512i low_bits = _mm512_set1_epi8(15);
    __m512i high[NIBBLE_SLICES];
#pragma GCC unroll 8
    for (size_t i = 0; i < count; i++) high[i] = _mm512_setzero_si512();
    for (size_t step = 0; step < steps; step++) {
        __builtin_prefetch(packed + step * 64 + 2048, 0, 2);
        __m512i both = _mm512_loadu_si512(packed + step * 64);
        __m512i low = _mm512_and_si512(both, low_bits), top = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits);
#pragma GCC unroll 8
        for (size_t i = 0; i < count; i++) {
            const int8_t *from = slice + i * stride + step * 8;
            add_word_products(&sums[i], low, from);
            add_word_products(&high[i], top, from + 4);
        }
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < count; i++) sums[i] = _mm512_add_epi32(sums[i], high[i]);
}

/* Panels of int8_panels.c: a line is 16 rows of 4 columns, 4 bytes a row, larger by PANEL_OFFSET; columns past a group are 0. */
#define HAS_PANELS 1
typedef int8_t panel_slice;

INLINE void pack_lines(const int8_t *const row[16], size_t column, size_t count, const uint8_t offset, uint8_t *to) {
    const __mmask64 mask = count >= 64 ? ~(__mmask64)0 : first_bytes(count);
    floats words[16];
#pragma GCC unroll 16
    for (size_t i = 0; i < 16; i++) {
        __m512i bytes = _mm512_maskz_loadu_epi8(mask, row[i] + column);
        if (offset) bytes = _mm512_maskz_mov_epi8(mask, flip(bytes));
        words[i] = _mm512_castsi512_ps(bytes);
    }
    transpose(words);
#pragma GCC unroll 16
    for (size_t i = 0; i < 16; i++) _mm512_store_ps(to + 64 * i, words[i]);
}

#if defined(__AMX_INT8__) || defined(EMULATED_TILES)
#include "amx.h"
#else
enum { PANEL_COLUMNS = 4, PANEL_LINES = 1, PACKED_COLUMNS = 64, PANEL_OFFSET = 128, PANEL_SLICES = 12, PANELS_AT_ONCE = 2, FEWEST_PANEL_SLICES = 128 };

INLINE void open_panels(void) {}
INLINE void close_panels(void) {}

INLINE void multiply_lines(ints sums[PANELS_AT_ONCE][PANEL_SLICES], const size_t count, const uint8_t *const panel[PANELS_AT_ONCE],
                           const panel_slice *slice, size_t stride, size_t lines) {
    for (size_t line = 0; line < lines; line++) {
        __m512i one = _mm512_load_si512(panel[0] + line * 64), two = _mm512_load_si512(panel[1] + line * 64);
#pragma GCC unroll 16
        for (size_t i = 0; i < count; i++) {
            int32_t word;
            memcpy(&word, slice + i * stride + line * 4, 4);
            __m512i part = _mm512_set1_epi32(word);
            add_byte_products(&sums[0][i], one, part);
            add_byte_products(&sums[1][i], two, part);
        }
    }
}
#endif

#ifdef __AVX512BF16__
/* Products of bfloat16 pairs: 32 columns at a time, rounded as the CPU's vdpbf16ps does. */
#define HAS_PAIRS 1
typedef __m512i pairs;

INLINE pairs load_pairs(const void *row, size_t column, size_t left) {
    __mmask32 mask = left >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1;
    return _mm512_maskz_loadu_epi16(mask, (const uint16_t *)row + column);
}
INLINE pairs spread_pair(const uint16_t *from) {
    int32_t both;
    memcpy(&both, from, 4);
    return _mm512_set1_epi32(both);
}
INLINE pairs keep_halves(pairs a, uint32_t halves) { return _mm512_and_si512(a, _mm512_set1_epi32((int)halves)); }
/* Rounded to the nearest bfloat16, denormals to zero, and back. */
INLINE floats store_pairs(uint16_t *to, floats value) {
    __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
    _mm256_storeu_si256((__m256i *)to, half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INLINE void add_pair_products(floats *sum, pairs a, pairs b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b)); }
#endif

/* Tiles of the float kernels that fit the registers. */
#define FLOAT_TOKENS 6
#define FLOAT_ROWS 4
#define KEYS_AT_ONCE 4

INLINE void relax(void) { _mm_pause(); }
