/* NEON with dot products (sdot): 16 floats in four registers; with i8mm integer products of 2 x 2 rows at once (smmla). See README.md. */
#include <arm_neon.h>

typedef struct { float32x4_t part[4]; } floats;
typedef struct { int32x4_t part[4]; } ints;

#define FOR_PARTS _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++)
#define BOTH(name, type, operation) \
    INLINE type name(type a, type b) { \
        type out; \
        FOR_PARTS out.part[k] = operation(a.part[k], b.part[k]); \
        return out; \
    }
#define ONE(name, from, to, operation) \
    INLINE to name(from a) { \
        to out; \
        FOR_PARTS out.part[k] = operation(a.part[k]); \
        return out; \
    }

/* As on x86: the second operand if one is NaN. */
INLINE float32x4_t min_part(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE float32x4_t max_part(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE float32x4_t max_bits_part(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a), vreinterpretq_s32_f32(b)));
}

INLINE floats spread(float value) {
    floats out;
    FOR_PARTS out.part[k] = vdupq_n_f32(value);
    return out;
}
INLINE floats load(const float *from) {
    floats out;
    FOR_PARTS out.part[k] = vld1q_f32(from + 4 * k);
    return out;
}
INLINE void store(float *to, floats value) {
    FOR_PARTS vst1q_f32(to + 4 * k, value.part[k]);
}
INLINE floats load_near(const float *from) { return load(from); }
INLINE floats load_part(const float *from, size_t count, floats other) {
    if (count >= 16) return load(from);
    float all[16];
    store(all, other);
    memcpy(all, from, count * 4);
    return load(all);
}

BOTH(add, floats, vaddq_f32)
BOTH(subtract, floats, vsubq_f32)
BOTH(multiply, floats, vmulq_f32)
BOTH(divide, floats, vdivq_f32)
BOTH(minimum, floats, min_part)
BOTH(maximum, floats, max_part)
BOTH(maximum_bits, floats, max_bits_part)
ONE(absolute, floats, floats, vabsq_f32)
ONE(round_whole, floats, floats, vrndnq_f32)
ONE(to_ints, floats, ints, vcvtnq_s32_f32)
ONE(to_floats, ints, floats, vcvtq_f32_s32)
BOTH(add_ints, ints, vaddq_s32)
BOTH(subtract_ints, ints, vsubq_s32)
BOTH(multiply_ints, ints, vmulq_s32)

INLINE floats fused(floats a, floats b, floats c) {
    FOR_PARTS c.part[k] = vfmaq_f32(c.part[k], a.part[k], b.part[k]);
    return c;
}
INLINE floats negative_fused(floats a, floats b, floats c) {
    FOR_PARTS c.part[k] = vfmsq_f32(c.part[k], a.part[k], b.part[k]);
    return c;
}
INLINE float largest(floats a) {
    float32x4_t all = max_part(max_part(a.part[0], a.part[1]), max_part(a.part[2], a.part[3]));
    return vmaxvq_f32(all);
}
INLINE float largest_bits(floats a) {
    float32x4_t all = max_bits_part(max_bits_part(a.part[0], a.part[1]), max_bits_part(a.part[2], a.part[3]));
    int32_t bits = vmaxvq_s32(vreinterpretq_s32_f32(all));
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
INLINE int any_above(floats a, float limit) {
    uint32x4_t within = vdupq_n_u32(~0u);
    FOR_PARTS within = vandq_u32(within, vcleq_f32(a.part[k], vdupq_n_f32(limit)));
    return vminvq_u32(within) == 0;
}
INLINE floats zero_below(floats x, float limit, floats value) {
    FOR_PARTS value.part[k] = vreinterpretq_f32_u32(
        vbicq_u32(vreinterpretq_u32_f32(value.part[k]), vcleq_f32(x.part[k], vdupq_n_f32(limit))));
    return value;
}
/* In two exact factors, since 2^128 is not a float. */
INLINE floats times_power_of_two(floats a, floats exponent) {
    FOR_PARTS {
        int32x4_t whole = vcvtnq_s32_f32(exponent.part[k]), first = vshrq_n_s32(whole, 1), second = vsubq_s32(whole, first);
        a.part[k] = vmulq_f32(a.part[k], vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(first, vdupq_n_s32(127)), 23)));
        a.part[k] = vmulq_f32(a.part[k], vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(second, vdupq_n_s32(127)), 23)));
    }
    return a;
}
INLINE ints spread_int(int32_t value) {
    ints out;
    FOR_PARTS out.part[k] = vdupq_n_s32(value);
    return out;
}
INLINE ints load_ints(const int32_t *from) {
    ints out;
    FOR_PARTS out.part[k] = vld1q_s32(from + 4 * k);
    return out;
}

INLINE int8x16_t load_16_bytes(const void *from, size_t count) {
    if (count >= 16) return vld1q_s8(from);
    int8_t all[16] = {0};
    memcpy(all, from, count);
    return vld1q_s8(all);
}
INLINE floats load_bytes(const int8_t *from, size_t count) {
    int8x16_t all = load_16_bytes(from, count);
    int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_high_s8(all);
    return (floats){{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
                     vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
/* Values from -128 to 127. */
INLINE void store_bytes(int8_t *to, ints value, size_t count) {
    int16x8_t low = vcombine_s16(vmovn_s32(value.part[0]), vmovn_s32(value.part[1]));
    int16x8_t high = vcombine_s16(vmovn_s32(value.part[2]), vmovn_s32(value.part[3]));
    int8_t all[16];
    vst1q_s8(all, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    memcpy(to, all, smaller(16, count));
}

INLINE float32x4_t from_half(uint16x4_t half, int dtype) {
    if (dtype == FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}
/* The first, or second, values of 16 pairs of bfloat16. */
INLINE floats load_firsts(const uint16_t *from) {
    floats out;
    FOR_PARTS out.part[k] = vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(from + 8 * k)), 16));
    return out;
}
INLINE floats load_seconds(const uint16_t *from) {
    floats out;
    FOR_PARTS out.part[k] =
        vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(vld1q_u16(from + 8 * k)), vdupq_n_u32(0xffff0000u)));
    return out;
}
/* Round to the nearest, ties to even; a bfloat16 preserves denormals and NaN: as PyTorch rounds. */
INLINE uint16x4_t to_half(float32x4_t value, int dtype) {
    if (dtype == FLOAT16) return vreinterpret_u16_f16(vcvt_f16_f32(value));
    uint32x4_t bits = vreinterpretq_u32_f32(value), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, vdupq_n_u32(0x7fc00000)), 16);
}
INLINE floats load_floats(const void *data, int dtype, size_t index, size_t count) {
    if (dtype == FLOAT32) return load_part((const float *)data + index, count, spread(0.0f));
    const uint16_t *from = (const uint16_t *)data + index;
    uint16_t all[16] = {0};
    if (count < 16) from = memcpy(all, from, count * 2);
    floats out;
    FOR_PARTS out.part[k] = from_half(vld1_u16(from + 4 * k), dtype);
    return out;
}
INLINE void store_floats(void *data, int dtype, size_t index, floats value, size_t count) {
    char *to = (char *)data + index * item_bytes(dtype), all[64];
    char *at = count >= 16 ? to : all;
    FOR_PARTS {
        if (dtype == FLOAT32) vst1q_f32((float *)at + 4 * k, value.part[k]);
        else vst1_u16((uint16_t *)at + 4 * k, to_half(value.part[k], dtype));
    }
    if (count < 16) memcpy(to, all, count * item_bytes(dtype));
}
/* Store the first `count` of four results. */
INLINE void store_four(void *data, int dtype, size_t index, four_floats value, size_t count) {
    char all[16];
    if (dtype == FLOAT32) vst1q_f32((float *)all, (float32x4_t)value);
    else vst1_u16((uint16_t *)all, to_half((float32x4_t)value, dtype));
    memcpy((char *)data + index * item_bytes(dtype), all, smaller(4, count) * item_bytes(dtype));
}

INLINE floats round_floats(floats value, int dtype) {
    if (dtype == FLOAT32) return value;
    FOR_PARTS value.part[k] = from_half(to_half(value.part[k], dtype), dtype);
    return value;
}

/* Pairwise: (lane 0 + lane 2) + (lane 1 + lane 3) of each vector, in the order of the other sets. */
INLINE float32x4_t sum_group(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
    float32x4_t ab = vaddq_f32(vzip1q_f32(a, b), vzip2q_f32(a, b)), cd = vaddq_f32(vzip1q_f32(c, d), vzip2q_f32(c, d));
    float64x2_t low = vzip1q_f64(vreinterpretq_f64_f32(ab), vreinterpretq_f64_f32(cd));
    float64x2_t high = vzip2q_f64(vreinterpretq_f64_f32(ab), vreinterpretq_f64_f32(cd));
    return vaddq_f32(vreinterpretq_f32_f64(low), vreinterpretq_f32_f64(high));
}
INLINE four_floats sum_four_floats(floats a, floats b, floats c, floats d) {
    float32x4_t group[4];
    FOR_PARTS group[k] = sum_group(a.part[k], b.part[k], c.part[k], d.part[k]);
    return (four_floats)vaddq_f32(vaddq_f32(group[0], group[2]), vaddq_f32(group[1], group[3]));
}

INLINE void transpose(floats row[16]) {
    float all[16][16], turned[16][16];
    for (int i = 0; i < 16; i++) store(all[i], row[i]);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) turned[k][i] = all[i][k];
    for (int i = 0; i < 16; i++) row[i] = load(turned[i]);
}

/* Integer products of int8_linear.c. */
#define INT_SLICES 6
enum { WIDTH = 16, WEIGHT_OFFSET = 0, INT_ROWS = 4 };
typedef int32x4_t int_sums;
typedef int8x16_t weights, slices;

INLINE int_sums no_sums(void) { return vdupq_n_s32(0); }
INLINE weights load_weights(const int8_t *from) { return vld1q_s8(from); }
INLINE weights load_weights_part(const int8_t *from, size_t count) { return load_16_bytes(from, count); }
INLINE slices load_slices(const int8_t *from) { return vld1q_s8(from); }
INLINE slices load_slices_part(const int8_t *from, size_t count) { return load_16_bytes(from, count); }
INLINE void add_products(int_sums *sum, weights weight, slices slice) { *sum = vdotq_s32(*sum, weight, slice); }
INLINE four_ints sum_four_ints(int_sums a, int_sums b, int_sums c, int_sums d) {
    return (four_ints)vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}

#ifdef __ARM_FEATURE_MATMUL_INT8
/* Tiles of two slices by two rows: sums[i][j] of even i and j holds the four products of slices i, i + 1 and rows j, j + 1. */
#define HAS_PAIR_TILES 1
INLINE int8x16_t low_halves(int8x16_t a, int8x16_t b) { return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b))); }
INLINE int8x16_t high_halves(int8x16_t a, int8x16_t b) { return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b))); }
INLINE void add_pair_tile(int_sums *sum, slices one, slices two, weights row, weights next) {
    *sum = vmmlaq_s32(*sum, low_halves(one, two), low_halves(row, next));
    *sum = vmmlaq_s32(*sum, high_halves(one, two), high_halves(row, next));
}
/* The products of one of the two slices with four rows. */
INLINE four_ints read_pair_tiles(int_sums left, int_sums right, size_t second) {
    int64x2_t a = vreinterpretq_s64_s32(left), b = vreinterpretq_s64_s32(right);
    return (four_ints)vreinterpretq_s32_s64(second ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
}
#endif

INLINE int32_t sum_bytes(const int8_t *from, size_t count) {
    int32_t sum = 0;
    for (size_t i = 0; i < count; i++) sum += from[i];
    return sum;
}

/* Products of int4_linear.c: 16 rows of 8 columns are 64 bytes, 4 bytes a row: low nibbles the first 4 columns, high nibbles the others. */
#define NIBBLE_SLICES 4

INLINE void add_nibble_products(ints *sums, const size_t count, const uint8_t *packed, const int8_t *slice, size_t stride, size_t steps) {
    for (size_t step = 0; step < steps; step++) {
        __builtin_prefetch(packed + step * 64 + 2048, 0, 2);
        FOR_PARTS {
            uint8x16_t both = vld1q_u8(packed + step * 64 + 16 * k);
            int8x16_t low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), high = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
#pragma GCC unroll 4
            for (size_t i = 0; i < count; i++) {
                int8x8_t words = vld1_s8(slice + i * stride + step * 8);
                sums[i].part[k] = vdotq_lane_s32(sums[i].part[k], low, words, 0);
                sums[i].part[k] = vdotq_lane_s32(sums[i].part[k], high, words, 1);
            }
        }
    }
}

#define FLOAT_TOKENS 3
#define FLOAT_ROWS 2
#define KEYS_AT_ONCE 1

INLINE void relax(void) { __asm__ volatile("yield"); }
