// Does as many multiplications and additions as a core can: 12 independent chains, all in registers.
#include <stdint.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define CHAINS 12  // more than latency times units on today's cores, fewer than AVX2's 16 registers

typedef float vec __attribute__((vector_size(4 * LANES)));

// Returns how many it has done: one multiplication and one addition for each lane, chain and round.
int64_t multiply_add(int64_t rounds, float factor, float *result) {
    vec chain[CHAINS];
    _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) chain[i] = (float)i - (vec){0};
    for (int64_t round = 0; round < rounds; round++)
        _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) chain[i] = chain[i] * factor + 1.0f;
    vec sum = {0};
    for (int i = 0; i < CHAINS; i++) sum += chain[i];
    *result = 0;
    for (int lane = 0; lane < LANES; lane++) *result += sum[lane];
    return rounds * CHAINS * LANES * 2;
}
