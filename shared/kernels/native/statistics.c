/* Post-vision statistics in one call; see statistics.py for the arguments. */
#include "statistics_call.h"

#include <stddef.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Weak: missing where the compiler does not know the tiles' instructions. */
__attribute__((weak)) void statistics_rows(void *call);
__attribute__((weak)) void statistics_columns(const Call *call);

#define AMX_BF16 (1u << 22) /* in edx of CPUID's leaf 7 */
#define AMX_TILE (1u << 24)
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

int statistics_available(void) {
    unsigned eax, ebx, ecx, edx;
    if (!statistics_rows || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("fma")) return 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || ~edx & (AMX_BF16 | AMX_TILE)) return 0;
    /* the operating system lets those processes have the tiles' registers that ask */
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#else
static void (*const statistics_rows)(void *) = NULL;
static void (*const statistics_columns)(const Call *) = NULL;

int statistics_available(void) { return 0; }
#endif

/* GOMP_parallel, as in slab_attention.c. */
typedef void (*Parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

void statistics(Call *call, Parallel parallel, unsigned threads) {
    if (parallel && threads > 1)
        parallel(statistics_rows, call, threads, 0);
    else
        statistics_rows(call);
    statistics_columns(call);
}
