/* AVX2 with FMA and F16C: 16 floats in two registers; with AVX-VNNI byte products in one instruction. See README.md. */
#include <immintrin.h>

typedef struct { __m256 low, high; } floats;
typedef struct { __m256i low, high; } ints;

#define EACH(operation, a, b) ((floats){operation((a).low, (b).low), operation((a).high, (b).high)})
#define EACH_INT(operation, a, b) ((ints){operation((a).low, (b).low), operation((a).high, (b).high)})

INLINE floats spread(float value) { return (floats){_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
INLINE floats load(const float *from) { return (floats){_mm256_load_ps(from), _mm256_load_ps(from + 8)}; }
INLINE void store(float *to, floats value) { _mm256_store_ps(to, value.low), _mm256_store_ps(to + 8, value.high); }
INLINE floats load_near(const float *from) { return (floats){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE floats load_part(const float *from, size_t count, floats other) {
    if (count >= 16) return load_near(from);
    float all[16] __attribute__((aligned(32)));
    store(all, other);
    memcpy(all, from, count * 4);
    return load(all);
}

INLINE floats add(floats a, floats b) { return EACH(_mm256_add_ps, a, b); }
INLINE floats subtract(floats a, floats b) { return EACH(_mm256_sub_ps, a, b); }
INLINE floats multiply(floats a, floats b) { return EACH(_mm256_mul_ps, a, b); }
INLINE floats divide(floats a, floats b) { return EACH(_mm256_div_ps, a, b); }
INLINE floats fused(floats a, floats b, floats c) {
    return (floats){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE floats negative_fused(floats a, floats b, floats c) {
    return (floats){_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
INLINE floats minimum(floats a, floats b) { return EACH(_mm256_min_ps, a, b); }
INLINE floats maximum(floats a, floats b) { return EACH(_mm256_max_ps, a, b); }
INLINE floats absolute(floats a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (floats){_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
INLINE float largest(floats a) {
    __m256 both = _mm256_max_ps(a.low, a.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE floats maximum_bits(floats a, floats b) {
    return (floats){_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.low), _mm256_castps_si256(b.low))),
                    _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.high), _mm256_castps_si256(b.high)))};
}
INLINE float largest_bits(floats a) {
    __m256i both = _mm256_max_epi32(_mm256_castps_si256(a.low), _mm256_castps_si256(a.high));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
}
INLINE int any_above(floats a, float limit) {
    __m256 bound = _mm256_set1_ps(limit);
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.low, bound, _CMP_NLE_UQ), _mm256_cmp_ps(a.high, bound, _CMP_NLE_UQ))) != 0;
}
INLINE floats zero_below(floats x, float limit, floats value) {
    __m256 bound = _mm256_set1_ps(limit);
    return (floats){_mm256_and_ps(_mm256_cmp_ps(x.low, bound, _CMP_NLE_UQ), value.low),
                    _mm256_and_ps(_mm256_cmp_ps(x.high, bound, _CMP_NLE_UQ), value.high)};
}
INLINE floats round_whole(floats a) {
    return (floats){_mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                    _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
/* In two exact factors, since 2^128 is not a float. */
INLINE __m256 scale_half(__m256 a, __m256 exponent) {
    __m256i whole = _mm256_cvtps_epi32(exponent), first = _mm256_srai_epi32(whole, 1), second = _mm256_sub_epi32(whole, first);
    const __m256i bias = _mm256_set1_epi32(127);
    a = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23)));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23)));
}
INLINE floats times_power_of_two(floats a, floats exponent) { return EACH(scale_half, a, exponent); }

INLINE ints to_ints(floats a) { return (ints){_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
INLINE floats to_floats(ints a) { return (floats){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE ints spread_int(int32_t value) { return (ints){_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
INLINE ints subtract_ints(ints a, ints b) { return EACH_INT(_mm256_sub_epi32, a, b); }
INLINE ints add_ints(ints a, ints b) { return EACH_INT(_mm256_add_epi32, a, b); }
INLINE ints multiply_ints(ints a, ints b) { return EACH_INT(_mm256_mullo_epi32, a, b); }
INLINE ints load_ints(const int32_t *from) { return (ints){_mm256_load_si256((const __m256i *)from), _mm256_load_si256((const __m256i *)from + 1)}; }

INLINE __m128i load_16_bytes(const void *from, size_t count) {
    if (count >= 16) return _mm_loadu_si128((const __m128i *)from);
    char all[16] __attribute__((aligned(16))) = {0};
    memcpy(all, from, count);
    return _mm_load_si128((const __m128i *)all);
}
INLINE floats load_bytes(const int8_t *from, size_t count) {
    __m128i all = load_16_bytes(from, count);
    return (floats){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(all, 8)))};
}
/* Values from -128 to 127. */
INLINE void store_bytes(int8_t *to, ints value, size_t count) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(value.low, value.high), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (count >= 16) {
        _mm_storeu_si128((__m128i *)to, bytes);
    } else {
        char all[16] __attribute__((aligned(16)));
        _mm_store_si128((__m128i *)all, bytes);
        memcpy(to, all, count);
    }
}

INLINE floats from_halves(__m256i half, int dtype) {
    __m128i low = _mm256_castsi256_si128(half), high = _mm256_extracti128_si256(half, 1);
    if (dtype == FLOAT16) return (floats){_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
    return (floats){_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16)),
                    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16))};
}
/* The first, or second, values of 16 pairs of bfloat16. */
INLINE floats load_firsts(const uint16_t *from) {
    const __m256i *both = (const __m256i *)from;
    return (floats){_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(both), 16)),
                    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(both + 1), 16))};
}
INLINE floats load_seconds(const uint16_t *from) {
    const __m256i *both = (const __m256i *)from, high = _mm256_set1_epi32((int)0xffff0000u);
    return (floats){_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(both), high)),
                    _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(both + 1), high))};
}
INLINE floats load_floats(const void *data, int dtype, size_t index, size_t count) {
    if (dtype == FLOAT32) return load_part((const float *)data + index, count, spread(0.0f));
    const uint16_t *from = (const uint16_t *)data + index;
    if (count >= 16) return from_halves(_mm256_loadu_si256((const __m256i *)from), dtype);
    uint16_t all[16] __attribute__((aligned(32))) = {0};
    memcpy(all, from, count * 2);
    return from_halves(_mm256_load_si256((const __m256i *)all), dtype);
}
/* Round to the nearest bfloat16, ties to even, preserving denormals and NaN: as PyTorch rounds. The upper 16 bits. */
INLINE __m256i bfloat16_bits(__m256 value) {
    __m256i bits = _mm256_castps_si256(value), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
INLINE __m256i to_halves(floats value, int dtype) {
    if (dtype == FLOAT16)
        return _mm256_set_m128i(_mm256_cvtps_ph(value.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                                _mm256_cvtps_ph(value.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(bfloat16_bits(value.low), bfloat16_bits(value.high)), 0xd8);
}
INLINE void store_floats(void *data, int dtype, size_t index, floats value, size_t count) {
    char all[64] __attribute__((aligned(32)));
    char *to = (char *)data + index * item_bytes(dtype);
    if (dtype == FLOAT32) {
        if (count >= 16) {
            _mm256_storeu_ps((float *)to, value.low), _mm256_storeu_ps((float *)to + 8, value.high);
            return;
        }
        store((float *)all, value);
    } else {
        if (count >= 16) {
            _mm256_storeu_si256((__m256i *)to, to_halves(value, dtype));
            return;
        }
        _mm256_store_si256((__m256i *)all, to_halves(value, dtype));
    }
    memcpy(to, all, count * item_bytes(dtype));
}
/* Store the first `count` of four results. */
INLINE void store_four(void *data, int dtype, size_t index, four_floats value, size_t count) {
    char *to = (char *)data + index * item_bytes(dtype);
    __m128i all = (__m128i)value;
    if (dtype != FLOAT32) all = _mm256_castsi256_si128(to_halves((floats){_mm256_zextps128_ps256((__m128)value), _mm256_setzero_ps()}, dtype));
    if (count < 4) {
        char parts[16];
        _mm_storeu_si128((__m128i *)parts, all);
        memcpy(to, parts, count * item_bytes(dtype));
    } else if (dtype == FLOAT32) {
        _mm_storeu_si128((__m128i *)to, all);
    } else {
        _mm_storel_epi64((__m128i *)to, all);
    }
}

INLINE floats round_floats(floats value, int dtype) { return dtype == FLOAT32 ? value : from_halves(to_halves(value, dtype), dtype); }

/* Sums of the four groups of four lanes, of each vector. */
INLINE __m256 sum_groups(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    __m256 low = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd)));
    return _mm256_add_ps(low, _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd))));
}
INLINE four_floats sum_four_floats(floats a, floats b, floats c, floats d) {
    __m256 half = _mm256_add_ps(sum_groups(a.low, b.low, c.low, d.low), sum_groups(a.high, b.high, c.high, d.high));
    return (four_floats)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

INLINE void transpose(floats row[16]) {
    float all[16][16] __attribute__((aligned(32))), turned[16][16] __attribute__((aligned(32)));
    for (int i = 0; i < 16; i++) store(all[i], row[i]);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) turned[k][i] = all[i][k];
    for (int i = 0; i < 16; i++) row[i] = load(turned[i]);
}

/* Integer products of int8_linear.c. */
#define INT_SLICES 3
typedef __m256i int_sums, weights, slices;
#ifdef __AVXVNNI__
enum { WIDTH = 32, WEIGHT_OFFSET = 128, INT_ROWS = 4 };
INLINE __m256i load_32_bytes(const void *from, size_t count) {
    char all[32] __attribute__((aligned(32))) = {0};
    memcpy(all, from, count);
    return _mm256_load_si256((const __m256i *)all);
}
/* A flipped sign bit makes a signed byte unsigned and larger by WEIGHT_OFFSET. */
INLINE __m256i flip(__m256i bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8((char)128)); }
INLINE weights load_weights(const int8_t *from) { return flip(_mm256_loadu_si256((const __m256i *)from)); }
INLINE weights load_weights_part(const int8_t *from, size_t count) { return flip(load_32_bytes(from, count)); }
INLINE slices load_slices(const int8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE slices load_slices_part(const int8_t *from, size_t count) { return load_32_bytes(from, count); }
INLINE void add_byte_products(__m256i *sum, __m256i bytes, __m256i signed_bytes) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(*sum) : "x"(bytes), "x"(signed_bytes));
}
INLINE void add_products(int_sums *sum, weights weight, slices slice) { add_byte_products(sum, weight, slice); }
#else
/* As 16-bit integers: products of pairs are then exact, where the instruction for bytes would saturate. */
enum { WIDTH = 16, WEIGHT_OFFSET = 0, INT_ROWS = 4 };
INLINE __m256i load_words(const int8_t *from, size_t count) { return _mm256_cvtepi8_epi16(load_16_bytes(from, count)); }
INLINE weights load_weights(const int8_t *from) { return load_words(from, 16); }
INLINE weights load_weights_part(const int8_t *from, size_t count) { return load_words(from, count); }
INLINE slices load_slices(const int8_t *from) { return load_words(from, 16); }
INLINE slices load_slices_part(const int8_t *from, size_t count) { return load_words(from, count); }
INLINE void add_products(int_sums *sum, weights weight, slices slice) {
    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(weight, slice));
}
#endif
INLINE int_sums no_sums(void) { return _mm256_setzero_si256(); }
INLINE four_ints sum_four_ints(int_sums a, int_sums b, int_sums c, int_sums d) {
    __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return (four_ints)_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

/* Panels of int8_panels.c: a line is 16 rows of one 32-bit word each: 4 columns larger by PANEL_OFFSET, or 2 columns of 16 bits. Columns past
   a group are 0. */
#define HAS_PANELS 1
#ifdef __AVXVNNI__
typedef int8_t panel_slice;
enum { PANEL_COLUMNS = 4, PANEL_LINES = 1, PACKED_COLUMNS = 32, PANEL_OFFSET = 128, PANEL_SLICES = 6, PANELS_AT_ONCE = 1, FEWEST_PANEL_SLICES = 48 };
INLINE __m256i load_panel_words(const int8_t *from, size_t count) {
    if (count >= 32) return load_weights(from);
    __m256i places = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
    return _mm256_and_si256(load_weights_part(from, count), _mm256_cmpgt_epi8(_mm256_set1_epi8((char)count), places));
}
INLINE void add_word_products(__m256i *sum, __m256i weight, __m256i slice) { add_byte_products(sum, weight, slice); }
#else
typedef int16_t panel_slice;
enum { PANEL_COLUMNS = 2, PANEL_LINES = 1, PACKED_COLUMNS = 16, PANEL_OFFSET = 0, PANEL_SLICES = 6, PANELS_AT_ONCE = 1, FEWEST_PANEL_SLICES = 16 };
INLINE __m256i load_panel_words(const int8_t *from, size_t count) { return load_words(from, count); }
/* Inline assembly, since GCC 12 computes all products before it adds the first, which takes more registers than there are. */
INLINE void add_word_products(__m256i *sum, __m256i weight, __m256i slice) {
    __m256i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(*sum), "=&x"(product) : "x"(weight), "x"(slice));
}
#endif

INLINE void open_panels(void) {}
INLINE void close_panels(void) {}

INLINE void turn_words(const __m256i row[8], uint8_t *to) {
    __m256i four[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        __m256i a = _mm256_unpacklo_epi32(row[i], row[i + 1]), b = _mm256_unpackhi_epi32(row[i], row[i + 1]);
        __m256i c = _mm256_unpacklo_epi32(row[i + 2], row[i + 3]), d = _mm256_unpackhi_epi32(row[i + 2], row[i + 3]);
        four[i] = _mm256_unpacklo_epi64(a, c);
        four[i + 1] = _mm256_unpackhi_epi64(a, c);
        four[i + 2] = _mm256_unpacklo_epi64(b, d);
        four[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_store_si256((__m256i *)(to + 64 * i), _mm256_permute2x128_si256(four[i], four[i + 4], 0x20));
        _mm256_store_si256((__m256i *)(to + 64 * (i + 4)), _mm256_permute2x128_si256(four[i], four[i + 4], 0x31));
    }
}

INLINE void pack_lines(const int8_t *const row[16], size_t column, size_t count, const uint8_t offset, uint8_t *to) {
    (void)offset;
#pragma GCC unroll 2
    for (size_t half = 0; half < 2; half++) {
        __m256i words[8];
#pragma GCC unroll 8
        for (size_t i = 0; i < 8; i++) words[i] = load_panel_words(row[half * 8 + i] + column, count);
        turn_words(words, to + half * 32);
    }
}

INLINE void multiply_lines(ints sums[PANELS_AT_ONCE][PANEL_SLICES], const size_t count, const uint8_t *const panel[PANELS_AT_ONCE],
                           const panel_slice *slice, size_t stride, size_t lines) {
    for (size_t line = 0; line < lines; line++) {
        __m256i low = _mm256_load_si256((const __m256i *)(panel[0] + line * 64));
        __m256i high = _mm256_load_si256((const __m256i *)(panel[0] + line * 64 + 32));
#pragma GCC unroll 8
        for (size_t i = 0; i < count; i++) {
            int32_t word;
            memcpy(&word, slice + i * stride + line * PANEL_COLUMNS, 4);
            __m256i part = _mm256_set1_epi32(word);
            add_word_products(&sums[0][i].low, low, part);
            add_word_products(&sums[0][i].high, high, part);
        }
    }
}

INLINE int32_t sum_bytes(const int8_t *from, size_t count) {
    int32_t sum = 0;
    for (size_t i = 0; i < count; i++) sum += from[i];
    return sum;
}

/* Products of int4_linear.c: 16 rows of 8 columns are 64 bytes, 4 bytes a row: low nibbles the first 4 columns, high nibbles the others. */
#define NIBBLE_SLICES 3

INLINE __m256i spread_word(const int8_t *from) {
    int32_t word;
    memcpy(&word, from, 4);
    return _mm256_set1_epi32(word);
}

INLINE void add_nibble_products(ints *sums, const size_t count, const uint8_t *packed, const int8_t *slice, size_t stride, size_t steps) {
    const __m256i low_bits = _mm256_set1_epi8(15);
#ifndef __AVXVNNI__
    const __m256i ones = _mm256_set1_epi16(1);
#endif
    /* Four steps of 8 products of at most 15 * 128 in pairs fit 16 bits. */
    for (size_t first = 0; first < steps; first += 4) {
        size_t stop = smaller(first + 4, steps);
#ifndef __AVXVNNI__
        __m256i words[NIBBLE_SLICES][2];
#pragma GCC unroll 4
        for (size_t i = 0; i < count; i++) words[i][0] = words[i][1] = _mm256_setzero_si256();
#endif
        for (size_t step = first; step < stop; step++) {
            __builtin_prefetch(packed + step * 64 + 2048, 0, 2);
#pragma GCC unroll 2
            for (size_t half = 0; half < 2; half++) {
                __m256i both = _mm256_loadu_si256((const __m256i *)(packed + step * 64 + half * 32));
                __m256i low = _mm256_and_si256(both, low_bits), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits);
#pragma GCC unroll 4
                for (size_t i = 0; i < count; i++) {
                    const int8_t *from = slice + i * stride + step * 8;
#ifdef __AVXVNNI__
                    __m256i *sum = half ? &sums[i].high : &sums[i].low;
                    add_byte_products(sum, low, spread_word(from));
                    add_byte_products(sum, high, spread_word(from + 4));
#else
                    __m256i two = _mm256_add_epi16(_mm256_maddubs_epi16(low, spread_word(from)), _mm256_maddubs_epi16(high, spread_word(from + 4)));
                    words[i][half] = _mm256_add_epi16(words[i][half], two);
#endif
                }
            }
        }
#ifndef __AVXVNNI__
#pragma GCC unroll 4
        for (size_t i = 0; i < count; i++) {
            sums[i].low = _mm256_add_epi32(sums[i].low, _mm256_madd_epi16(words[i][0], ones));
            sums[i].high = _mm256_add_epi32(sums[i].high, _mm256_madd_epi16(words[i][1], ones));
        }
#endif
    }
}

#define FLOAT_TOKENS 3
#define FLOAT_ROWS 2
#define KEYS_AT_ONCE 1

INLINE void relax(void) { _mm_pause(); }
