/* Whether this processor has what the other kernels of this folder need, and which version of the interface they have. */

/* Raised with every change of a signature: a library that was built from other sources is not used. */
int tandem_interface(void) { return 3; }

int tandem_supported(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}
