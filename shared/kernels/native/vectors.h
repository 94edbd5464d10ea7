/* Vectors as wide as the instruction set that is compiled for, in GCC's and clang's generic notation. */
#ifndef VECTORS_H
#define VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define EACH(f, x) EACH8(f, 0, x), EACH8(f, 8, x)
#elif defined(__AVX2__)
#define LANES 8
#define EACH(f, x) EACH8(f, 0, x)
#else
#define LANES 4
#define EACH(f, x) EACH4(f, 0, x)
#endif
#define EACH4(f, i, x) f(i, x), f((i) + 1, x), f((i) + 2, x), f((i) + 3, x)
#define EACH8(f, i, x) EACH4(f, i, x), EACH4(f, (i) + 4, x)

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

INLINE Floats splat(float value) { return (Floats){0} + value; }

INLINE Floats load(const float *at) {
    Floats vector;
    memcpy(&vector, at, sizeof vector);
    return vector;
}

INLINE void store(float *at, Floats vector) { memcpy(at, &vector, sizeof vector); }

INLINE Floats choose(Ints mask, Floats yes, Floats no) { return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask)); }

INLINE Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }

/* Lane i of `a` where i lacks the bit `step`, of `b` where it has it; and that vector's lane a step away. */
#define OWN(i, step) ((i) + ((i) & (step) ? LANES : 0))
#define PARTNER(i, step) (OWN(i, step) ^ (step))
#define FOLD(a, b, step) (SHUFFLE(a, b, EACH(OWN, step)) + SHUFFLE(a, b, EACH(PARTNER, step)))

/* Lane i of the result is the sum over all lanes of vectors[i]; overwrites them. */
INLINE Floats sums(Floats vectors[LANES]) {
#if LANES >= 16
    UNROLL for (int i = 0; i < 8; i++) vectors[i] = FOLD(vectors[i], vectors[i + 8], 8);
#endif
#if LANES >= 8
    UNROLL for (int i = 0; i < 4; i++) vectors[i] = FOLD(vectors[i], vectors[i + 4], 4);
#endif
    UNROLL for (int i = 0; i < 2; i++) vectors[i] = FOLD(vectors[i], vectors[i + 2], 2);
    return FOLD(vectors[0], vectors[1], 1);
}

#define MIRRORED(i, step) ((i) ^ (step))
#define MIRROR(vector, step) SHUFFLE(vector, vector, EACH(MIRRORED, step))

INLINE float sum(Floats vector) {
#if LANES >= 16
    vector += MIRROR(vector, 8);
#endif
#if LANES >= 8
    vector += MIRROR(vector, 4);
#endif
    vector += MIRROR(vector, 2);
    return vector[0] + vector[1];
}

INLINE float largest(Floats vector) {
#if LANES >= 16
    vector = larger(vector, MIRROR(vector, 8));
#endif
#if LANES >= 8
    vector = larger(vector, MIRROR(vector, 4));
#endif
    vector = larger(vector, MIRROR(vector, 2));
    return vector[0] > vector[1] ? vector[0] : vector[1];
}

/* exp(x) for x <= 0: Cephes' expf polynomial after x = n ln 2 + r; 0 where it would not be a normal number. */
INLINE Floats exp_negative(Floats x) {
    const Floats rounder = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, in the lowest bits */
    const Floats rounded = x * 1.44269504f + rounder, n = rounded - rounder;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints power = ((Ints)rounded << 23) + (127 << 23);
    return choose(x < splat(-87.0f), (Floats){0}, p * (Floats)power);
}

/* Two vectors of neighbouring elements. In whole units of bf16 the first holds the even and the second the odd ones:
 * bf16 is the upper half of fp32, so each of them is one operation away from the 32 bits that they share. */
typedef struct {
    Floats first, second;
} Pair;

#define UNIT (2 * LANES) /* elements of a Pair; at the end of a row there may be half as many */

INLINE Pair load_pair(const char *from, const int elements, const int is_bf16) {
    if (!is_bf16) {
        const float *floats = (const float *)from;
        return (Pair){load(floats), elements == UNIT ? load(floats + LANES) : (Floats){0}};
    }
    if (elements == UNIT) {
        Bits both;
        memcpy(&both, from, sizeof both);
        return (Pair){(Floats)(both << 16), (Floats)(both & 0xffff0000u)};
    }
    Shorts half;
    memcpy(&half, from, sizeof half);
    return (Pair){(Floats)(__builtin_convertvector(half, Bits) << 16), {0}};
}

/* Rounded to bf16, to even, in the upper halves; the lower ones are rubbish. */
INLINE Bits round_bf16(Floats value) {
    const Bits bits = (Bits)value;
    const Floats rounded = (Floats)(bits + 0x7fff + ((bits >> 16) & 1));
    return (Bits)choose(value == value, rounded, splat(NAN));
}

INLINE void store_pair(char *to, Pair pair, const int elements, const int is_bf16) {
    if (!is_bf16) {
        store((float *)to, pair.first);
        if (elements == UNIT) store((float *)to + LANES, pair.second);
    } else if (elements == UNIT) {
        const Bits both = (round_bf16(pair.first) >> 16) | (round_bf16(pair.second) & 0xffff0000u);
        memcpy(to, &both, sizeof both);
    } else {
        const Shorts half = __builtin_convertvector(round_bf16(pair.first) >> 16, Shorts);
        memcpy(to, &half, sizeof half);
    }
}

#endif
