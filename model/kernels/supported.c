/* Whether this CPU runs the instructions that this library was compiled for, and the version of its interface. */

/* Incremented whenever a signature changes: a library built from other sources is not used. */
int tandem_interface(void) { return 6; }

#if defined(__x86_64__)
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
