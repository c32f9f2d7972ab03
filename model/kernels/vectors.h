/* Shared building blocks of the kernels: element types, exp, work space, and the vector layer of one instruction set.

   `instruction_sets/` holds the vector layer once per set: vectors of 16 floats whatever the width of the registers, and integer products.
   Its operations round alike and sum in the same order on every set, documented in `instruction_sets/README.md`, so that kernels written
   over them give a row the same bits everywhere; only bfloat16 products in pairs (AVX-512 BF16) differ. Every kernel computes each row
   independently and in a fixed order: results do not depend on the batch, the threads, or the split of a weight. */
#ifndef TANDEM_VECTORS_H
#define TANDEM_VECTORS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

INLINE size_t item_bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* Number of lanes in use of a vector of 16 that starts at `first` of `count`. */
INLINE size_t lanes(size_t first, size_t count) { return smaller(16, count - first); }

/* Four rows' results; plain vector arithmetic of the compiler. */
typedef float four_floats __attribute__((vector_size(16)));
typedef int32_t four_ints __attribute__((vector_size(16)));

#if defined(__AVX512VNNI__)
#include "instruction_sets/avx512.h"
#elif defined(__AVX2__)
#include "instruction_sets/avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "instruction_sets/neon.h"
#else
#error "no vector layer for this instruction set"
#endif

INLINE float sum_floats(floats a) {
    floats none = spread(0.0f);
    return sum_four_floats(a, none, none, none)[0];
}

/* exp, within 1.5 ulp; exactly 1 at 0, 0 below -87 (masked scores), NaN is preserved. Coefficients: Cephes. */
INLINE floats exp_floats(floats given) {
    floats x = minimum(spread(88.72f), given);
    floats n = round_whole(multiply(x, spread(1.44269504088896341f)));
    floats r = negative_fused(n, spread(0.693359375f), x);
    r = negative_fused(n, spread(-2.12194440e-4f), r);
    floats p = spread(1.9875691500e-4f);
    p = fused(p, r, spread(1.3981999507e-3f));
    p = fused(p, r, spread(8.3334519073e-3f));
    p = fused(p, r, spread(4.1665795894e-2f));
    p = fused(p, r, spread(1.6666665459e-1f));
    p = fused(p, r, spread(5.0000001201e-1f));
    p = add(fused(p, multiply(r, r), r), spread(1.0f));
    return zero_below(given, -87.0f, times_power_of_two(p, n));
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
