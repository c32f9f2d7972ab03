/* Whether this CPU runs the instructions that this library was compiled for, and the version of its interface. */

/* Incremented whenever a signature changes: a library built from other sources is not used. */
int tandem_interface(void) { return 7; }

#if defined(__x86_64__)
#if defined(__AMX_INT8__) || defined(EMULATED_TILES)
#include "vectors.h"

#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives a process the registers of tiles on request. Its children inherit them. */
__attribute__((unused)) static int request_tiles(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

/* Whether products of tiles are the sums that they should be: no CPU with AMX was at hand when this was written. */
__attribute__((noinline)) static int check_tiles(void) {
    static int8_t slices[PANEL_SLICES][64], rows[PANELS_AT_ONCE][16][64];
    static uint8_t lines[PANELS_AT_ONCE][16][64] __attribute__((aligned(64)));
    ints sums[PANELS_AT_ONCE][PANEL_SLICES];
    uint32_t state = 1;
    for (size_t i = 0; i < sizeof slices; i++) ((int8_t *)slices)[i] = (int8_t)((state = state * 1664525u + 1013904223u) >> 24);
    for (size_t i = 0; i < sizeof rows; i++) ((int8_t *)rows)[i] = (int8_t)((state = state * 1664525u + 1013904223u) >> 24);
    for (size_t panel = 0; panel < PANELS_AT_ONCE; panel++)
        for (size_t row = 0; row < 16; row++)
            for (size_t i = 0; i < 64; i++) lines[panel][i / 4][4 * row + i % 4] = rows[panel][row][i];
    open_panels();
    multiply_lines(sums, PANEL_SLICES, (const uint8_t *const[]){lines[0][0], lines[1][0]}, slices[0], 64, 16);
    close_panels();
    int wrong = 0;
    for (size_t panel = 0; panel < PANELS_AT_ONCE; panel++)
        for (size_t slice = 0; slice < PANEL_SLICES; slice++)
            for (size_t row = 0; row < 16; row++) {
                int32_t sum = 0;
                for (size_t i = 0; i < 64; i++) sum += slices[slice][i] * rows[panel][row][i];
                wrong |= sum != ((const int32_t *)&sums[panel][slice])[row];
            }
    return !wrong;
}
#endif

/* The CPU has `name`, or this library was compiled without it. */
#define HAS(name) __builtin_cpu_supports(name)

int tandem_supported(void) {
    __builtin_cpu_init();
    int supported = HAS("avx2") && HAS("fma") && HAS("f16c");
#ifdef __AVXVNNI__
    supported = supported && HAS("avxvnni");
#endif
#ifdef __AVX512VNNI__
    supported = supported && HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq") && HAS("avx512vnni");
#endif
#ifdef __AVX512BF16__
    supported = supported && HAS("avx512bf16");
#endif
#ifdef EMULATED_TILES
    supported = supported && check_tiles();
#elif defined(__AMX_INT8__)
    supported = supported && HAS("amx-tile") && HAS("amx-int8") && request_tiles() && check_tiles();
#endif
    return supported;
}
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

int tandem_supported(void) {
    int supported = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#ifdef __ARM_FEATURE_MATMUL_INT8
    supported = supported && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
#endif
    return supported;
}
#endif
