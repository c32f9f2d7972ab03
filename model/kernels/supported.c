/* Checks whether this CPU supports the kernels in this folder, and reports their interface version. */

/* Incremented whenever a signature changes: a library built from other sources is not used. */
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
