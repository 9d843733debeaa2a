// The network of LeCun et al. 1989, trained one digit at a time: forward, backward and update in one call.
//
// repro.py says what is right; this makes it fast. It is neither a library nor for networks of other sizes.
// One variant is compiled at a time, chosen by -D:
//   LOSS        MSE: squashed outputs, mean squared error  |  CROSS_ENTROPY: logits, softmax
//   ACTIVATION  TANH  |  SCALED_TANH: 1.7159 tanh(2x/3), outputs of MSE too  |  RELU: of hidden units
//   OPTIMIZER   SGD: one learning rate  |  SGD_RATES: one for each parameter  |  ADAMW
//   SHIFT       NONE  |  each digit moved by up to so many pixels both ways: ROLL, wrapping as torch.roll
//               does, or PAD, moving the background in
//   DROPOUT     0  |  1: of H2's outputs, while training
//   BATCH       0: a step after each digit  |  1: after each batch of them, down their mean gradient
//   SCHEME      BLOCKS: which maps of H1 a map of H2 reads, as below  |  ANY: 8 of the 12, as handed over
//   CURVATURE   0  |  1: not to train, but to measure how the loss curves, for rates
//
// The layout for SIMD. Every map of H2 reads 8 maps of H1, so 8 channels of a pixel lie side by side, and a
// convolution is a sum of (8 channels) * (8 weights), of *octets*. A vector holds one octet (AVX2, NEON) or
// two, of two maps of H2 (AVX-512); tiles of 8 to 10 such sums fit the 16 registers of AVX2. Only the forward
// pass has to sum within octets, and sum8 does that for eight at once.
// A pixel of H1 has 16 channels: its maps 0-11 and then 0-3 again. So the three groups of 8 maps that H2
// reads, 0-7, 4-11 and 8-11 with 0-3, are channels 0-7, 4-11 and 8-15, and nothing is ever gathered. The
// four copies cost a third more of H1's arithmetic and stay equal to their originals, bit for bit. Where the
// scheme is another one, every map of H2 has the 8 channels that it reads gathered, after H1 is computed.
//
// CURVATURE. The diagonal of the Gauss-Newton matrix (LeCun et al. 1998, appendix C: the second derivatives,
// without the terms of f'') is propagated back as gradients are, with weights, inputs and slopes squared: that
// is all that `power` is for.
//
// Every sum is taken in an order that does not depend on the vectors' width, and no product could be fused
// into either of two sums. So all compilers and machines with fused multiply-add should give the same bits.

#include <stdint.h>

#define MSE 1
#define CROSS_ENTROPY 2
#define TANH 1
#define SCALED_TANH 2
#define RELU 3
#define SGD 1
#define SGD_RATES 2
#define ADAMW 3
#define NONE 0
#define ROLL 1
#define PAD 2
#define BLOCKS 0
#define ANY 1

#ifdef __AVX512F__
#include <immintrin.h>
#define LANES 16
#else
#define LANES 8
#endif
#define OCTETS (LANES / 8)  // in a vector
#define VECTORS (4 / OCTETS)  // that hold the octets of the 4 maps of a group

// A group is the 4 maps of H2 that read the same 8 maps of H1. Units: H2 192, H3 30 of 32, outputs 10 of 16.
enum { GROUPS = 3, MAPS = 4, TAPS = 25, CHANNELS = 16, PIXELS = 64, BORDERED = 12, H2 = 192, H3 = 32, OUT = 16 };

#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")  // where the arrays inside are to be registers

// Parameters as packed; also their gradients, rates and moments. What is padding starts at 0 and stays 0.
struct network {
    float H1w[TAPS][CHANNELS];
    float H1b[PIXELS][CHANNELS];
    float H2w[GROUPS][TAPS][MAPS * 8];
    float H2b[GROUPS * 4][16];  // the 16 units of a group in one row of pixels: [map][column]
    float H3w[H2][H3];          // rows in the order of H2b
    float H3b[H3];
    float outw[H3][OUT];
    float outb[OUT];
} ALIGNED;

struct activations {
    float h1[BORDERED * BORDERED][CHANNELS];
    float h2[H2];
    float scale[H2];  // dropout: 0, or 1 / (1 - its rate)
    float kept[H2];   // h2 * scale
    float h3[H3];
    float out[OUT];
#if SCHEME == ANY
    int32_t reads[GROUPS][MAPS * 8];                           // channels, in the order of H2w
    float fields[GROUPS][BORDERED * BORDERED][MAPS * 8];  // h1 in these channels
#endif
} ALIGNED;

#define STORES_GRADIENT (OPTIMIZER == ADAMW || BATCH || CURVATURE)

struct learner {
    struct network net;
#if STORES_GRADIENT
    struct network gradient;
#endif
#if OPTIMIZER == SGD_RATES
    struct network rate;
#elif OPTIMIZER == ADAMW
    struct network moment1, moment2;
#endif
    float lr;
} ALIGNED;

// What Python hands over, and gets back for the next pass: the presentations so far and the betas' powers.
struct state {
    uint64_t seed, presentations;
    double beta1_power, beta2_power;  // both 1 at first
    double lr, beta1, beta2, epsilon, weight_decay, dropout;
    uint64_t shift_pixels;  // at most
};

// Vectors

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float octet __attribute__((vector_size(32)));
typedef int32_t ioctet __attribute__((vector_size(32)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float unaligned_octet __attribute__((vector_size(32), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const unaligned_vec *)p; }
INLINE void store(float *p, vec v) { *(unaligned_vec *)p = v; }
INLINE vec all(float x) { return x - (vec){0}; }

// Lane by lane: a where the condition holds, b elsewhere.
INLINE vec choose(ivec condition, vec a, vec b) { return (vec)((condition & (ivec)a) | (~condition & (ivec)b)); }

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE_OCTETS SHUFFLE
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#define SHUFFLE_OCTETS(a, b, ...) __builtin_shuffle(a, b, (ioctet){__VA_ARGS__})
#endif

#if LANES == 16
INLINE vec twice(const float *p) { return (vec)_mm512_broadcast_f64x4(_mm256_loadu_pd((const double *)p)); }
INLINE octet fold(vec v) {
    return (octet)_mm512_castpd512_pd256((__m512d)v) + (octet)_mm512_extractf64x4_pd((__m512d)v, 1);
}
INLINE vec permute(const float *p, const int32_t *lanes) {
    return (vec)_mm512_permutexvar_ps(_mm512_loadu_si512(lanes), (__m512)load(p));
}
// In each octet, lanes of a (0-7) and of b (8-15).
#define LANE(i, octet) ((i) + ((i) < 8 ? 0 : 8) + 8 * (octet))
#define OCTET(i, j, k, l, m, n, o, p, q) \
    LANE(i, q), LANE(j, q), LANE(k, q), LANE(l, q), LANE(m, q), LANE(n, q), LANE(o, q), LANE(p, q)
#define PICK(a, b, ...) SHUFFLE(a, b, OCTET(__VA_ARGS__, 0), OCTET(__VA_ARGS__, 1))
#else
INLINE vec twice(const float *p) { return load(p); }  // 8 channels, as often as a vector has octets
INLINE octet fold(vec v) { return v; }                // the sum of a vector's octets
INLINE vec permute(const float *p, const int32_t *lanes) {
    vec picked;
    UNROLL for (int i = 0; i < LANES; i++) picked[i] = p[lanes[i]];
    return picked;
}
#define PICK SHUFFLE
#endif

INLINE vec sum_pairs(vec a, vec b) {
    return PICK(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + PICK(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
}
INLINE vec sum_fours(vec a, vec b) {
    return PICK(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + PICK(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
INLINE vec sum_eights(vec a, vec b) {
    return PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

// In each octet: lane i is the sum of the same octet of v[i].
INLINE vec sum8(const vec v[8]) {
    return sum_eights(sum_fours(sum_pairs(v[0], v[1]), sum_pairs(v[2], v[3])),
                      sum_fours(sum_pairs(v[4], v[5]), sum_pairs(v[6], v[7])));
}

// The map of its group that octet o of vector v belongs to. In this order sum8 yields a row of H2b.
INLINE int map_of(int v, int o) { return OCTETS == 2 ? v + 2 * o : v; }

INLINE vec power(vec x) { return CURVATURE ? x * x : x; }

// Activation functions, and their slopes where the value is y

// x P(x^2) / Q(x^2), fitted for the least largest relative error up to 7.9; there tanh is 1 - 2.7e-7.
INLINE vec tanh_of(vec x) {
    x = choose(x > 7.9f, all(7.9f), x);  // NaN stays NaN
    x = choose(x < -7.9f, all(-7.9f), x);
    vec u = x * x;
    vec p = (((1.54279644e-08f * u + 2.20232394e-05f) * u + 0.00357899169f) * u + 0.134506203f) * u + 1.0f;
    vec q = (((8.59877675e-07f * u + 0.000342364999f) * u + 0.0261922367f) * u + 0.467839483f) * u + 1.0f;
    return x * p / q;
}

#if ACTIVATION == SCALED_TANH
INLINE vec squash(vec x) { return 1.7159f * tanh_of(2.0f / 3 * x); }
INLINE vec squash_slope(vec y) { return 1.7159f * 2 / 3 - 2.0f / 3 / 1.7159f * y * y; }
#else
INLINE vec squash(vec x) { return tanh_of(x); }
INLINE vec squash_slope(vec y) { return 1.0f - y * y; }
#endif

#if ACTIVATION == RELU
INLINE vec activate(vec x) { return choose(x < 0.0f, all(0), x); }
INLINE vec slope(vec y) { return choose(y > 0.0f, all(1), all(0)); }
#else
#define activate squash
#define slope squash_slope
#endif

// e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2, a polynomial fitted for the least largest relative error.
INLINE vec exp_of(vec x) {
    x = choose(x < -87.0f, all(-87), x);
    vec shifted = 1.44269504f * x + 12582912.0f;  // 1.5 * 2^23: rounds, and leaves n in the last bits
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f;  // ln 2, in a part that multiplies exactly and the rest
    r = r - n * -2.12194440e-4f;
    vec p = ((0.00138368461f * r + 0.00837481601f) * r + 0.0416682256f) * r + 0.166664202f;
    p = ((p * r + 0.499999921f) * r + 1.00000004f) * r + 1.0f;
    return (vec)((uvec)p + ((uvec)shifted << 23));
}

// Forward

INLINE int pixel(int y, int x) { return y * BORDERED + x; }

static void forward_H1(const struct network *net, const float *image, float (*h1)[CHANNELS]) {
    for (int y = 0; y < 8; y++)
        for (int c = 0; c < CHANNELS; c += LANES) {
            vec sum[8];
            UNROLL for (int x = 0; x < 8; x++) sum[x] = load(&net->H1b[8 * y + x][c]);
            for (int ky = 0; ky < 5; ky++)
                UNROLL for (int kx = 0; kx < 5; kx++) {
                    vec w = load(&net->H1w[5 * ky + kx][c]);
                    const float *field = image + 20 * (2 * y + ky) + kx;
                    UNROLL for (int x = 0; x < 8; x++) sum[x] += w * field[2 * x];
                }
            UNROLL for (int x = 0; x < 8; x++) store(&h1[pixel(y + 2, x + 2)][c], activate(sum[x]));
        }
}

#if SCHEME == ANY
static void gather_fields(struct activations *a) {
    for (int g = 0; g < GROUPS; g++)
        for (int y = 2; y < 10; y++)
            for (int x = 2; x < 10; x++)
                UNROLL for (int i = 0; i < MAPS * 8; i += LANES)
                    store(&a->fields[g][pixel(y, x)][i], permute(a->h1[pixel(y, x)], &a->reads[g][i]));
}
#endif

// What the maps of group g in vector v read there.
INLINE vec field(const struct activations *a, int g, int v, int pixel) {
#if SCHEME == ANY
    return load(&a->fields[g][pixel][v * LANES]);
#else
    (void)v;
    return twice(&a->h1[pixel][4 * g]);
#endif
}

static void forward_H2(const struct network *net, const struct activations *a, float *h2) {
    for (int g = 0; g < GROUPS; g++)
        for (int y = 0; y < 4; y++)
            for (int v = 0; v < VECTORS; v += 2) {
                vec sum[8] = {0};
                for (int ky = 0; ky < 5; ky++)
                    UNROLL for (int kx = 0; kx < 5; kx++) {
                        const float *w = &net->H2w[g][5 * ky + kx][v * LANES];
                        UNROLL for (int x = 0; x < 4; x++) {
                            int read = pixel(2 * y + ky, 2 * x + kx);
                            sum[x] += load(w) * field(a, g, v, read);
                            sum[4 + x] += load(w + LANES) * field(a, g, v + 1, read);
                        }
                    }
                int row = 4 * g + y;
                store(h2 + 16 * row + 4 * v, activate(sum8(sum) + load(&net->H2b[row][4 * v])));
            }
}

// y[j] = bias[j] + sum over k of w[k][j] x[k]
INLINE void forward_dense(int inputs, int outputs, const float *w, const float *bias, const float *x, float *y) {
    for (int j = 0; j < outputs; j += LANES) {
        vec part[8] = {0};
        for (int k = 0; k < inputs; k += 8)
            UNROLL for (int i = 0; i < 8; i++) part[i] += load(w + (k + i) * outputs + j) * x[k + i];
        vec sum = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
        store(y + j, sum + load(bias + j));
    }
}

// The outputs (CROSS_ENTROPY: logits) for an image (20, 20) that has its border on.
INLINE void forward(const struct network *net, const float *image, struct activations *a, int training) {
    forward_H1(net, image, a->h1);
#if SCHEME == ANY
    gather_fields(a);
#endif
    forward_H2(net, a, a->h2);
    float *h2 = a->h2;
    if (DROPOUT && training) {
        for (int j = 0; j < H2; j++) a->kept[j] = a->h2[j] * a->scale[j];
        h2 = a->kept;
    }
    forward_dense(H2, H3, net->H3w[0], net->H3b, h2, a->h3);
    for (int j = 0; j < H3; j += LANES) store(a->h3 + j, activate(load(a->h3 + j)));
    forward_dense(H3, OUT, net->outw[0], net->outb, a->h3, a->out);
    if (LOSS == MSE)
        for (int j = 0; j < OUT; j += LANES) store(a->out + j, squash(load(a->out + j)));
}

// Backward and update. d is an error: the derivative of the loss by the inputs of a layer's units.

// Take a gradient: step down at once, or leave it, or the batch's sum, to the optimiser.
INLINE void learn(struct learner *l, float *weight, vec gradient) {
#if STORES_GRADIENT
    float *kept = (float *)&l->gradient + (weight - (float *)&l->net);
    store(kept, BATCH || CURVATURE ? load(kept) + gradient : gradient);
#elif OPTIMIZER == SGD_RATES
    const float *rate = (float *)&l->rate + (weight - (float *)&l->net);
    store(weight, load(weight) - load(rate) * gradient);
#else
    store(weight, load(weight) - l->lr * gradient);
#endif
}

static void output_error(const float *out, const float *target, float *d) {
    float t[OUT] ALIGNED = {0};
    for (int j = 0; j < 10; j++) t[j] = target[j];
#if LOSS == MSE
    for (int j = 0; j < OUT; j += LANES)
        store(d + j, 2.0f / 10 * (CURVATURE ? all(1) : load(out + j) - load(t + j)) * power(squash_slope(load(out + j))));
#else
    float highest = out[0], sum = 0, e[OUT] ALIGNED;
    for (int j = 1; j < 10; j++) highest = out[j] > highest ? out[j] : highest;
    for (int j = 0; j < OUT; j += LANES) store(e + j, exp_of(load(out + j) - highest));  // of padding, nonsense
    for (int j = 0; j < 10; j++) sum += e[j];
    for (int j = 0; j < OUT; j++) d[j] = j < 10 ? e[j] / sum - t[j] : 0;
#endif
}

// Learn w from its inputs x and errors d, and pass the errors down: dx[k] = sum over j of w[k][j] d[j]
INLINE void backward_dense(int inputs, int outputs, struct learner *l, float *w, const float *x, const float *d,
                           float *dx) {
    for (int k = 0; k < inputs; k += 8) {
        octet sum = {0};
        for (int j = 0; j < 16; j += LANES) {
            vec part[8];
            UNROLL for (int i = 0; i < 8; i++) {
                float *row = w + (k + i) * outputs + j;
                part[i] = power(load(row)) * load(d + j);
                if (outputs == 32) part[i] += power(load(row + 16)) * load(d + j + 16);
                UNROLL for (int far = 0; far < outputs; far += 16)
                    learn(l, row + far, load(d + j + far) * power(all(x[k + i])));
            }
            sum = j == 0 ? fold(sum8(part)) : sum + fold(sum8(part));
        }
        *(unaligned_octet *)(dx + k) = sum;
    }
}

// Errors of H2 as vectors that fit its weights: each in all lanes of its octet.
struct spread {
    vec d[GROUPS][4][4][VECTORS];  // [group][y][x]
};

static void spread_errors(const float *d2, struct spread *s) {
    for (int g = 0; g < GROUPS; g++)
        for (int y = 0; y < 4; y++)
            UNROLL for (int x = 0; x < 4; x++)
                UNROLL for (int v = 0; v < VECTORS; v++) {
                    const float *d = d2 + (4 * g + y) * 16 + x;
#if LANES == 16
                    s->d[g][y][x][v] = SHUFFLE(all(d[4 * map_of(v, 0)]), all(d[4 * map_of(v, 1)]), 0, 1, 2, 3, 4, 5,
                                               6, 7, 24, 25, 26, 27, 28, 29, 30, 31);
#else
                    s->d[g][y][x][v] = all(d[4 * map_of(v, 0)]);
#endif
                }
}

// Errors of H1 from those of H2, a row of pixels at a time; nothing is passed to the border.
static void backward_H2(const struct network *net, const struct spread *s, const struct activations *a,
                        float (*d1)[CHANNELS]) {
    for (int y = 0; y < 8; y++) {
#if SCHEME == ANY
        for (int x = 0; x < 8; x++)
            for (int c = 0; c < CHANNELS; c++) d1[8 * y + x][c] = 0;
#else
        octet sum[GROUPS][8];
#endif
        for (int g = 0; g < GROUPS; g++)
            for (int v = 0; v < VECTORS; v += 2) {
                vec part[8][2] = {{{0}}};  // of v and v + 1; BLOCKS: of both in one
                for (int from = 0; from < 4; from++) {  // the rows of H2 that read this one, with their row ky
                    int ky = y + 2 - 2 * from;
                    if (ky < 0 || ky > 4) continue;
                    UNROLL for (int i = 0; i < 2; i++)
                        UNROLL for (int kx = 0; kx < 5; kx++) {
                            vec w = power(load(&net->H2w[g][5 * ky + kx][(v + i) * LANES]));
                            UNROLL for (int x = 0; x < 4; x++) {
                                int to = 2 * x + kx - 2;
                                if (to >= 0 && to < 8)
                                    part[to][SCHEME == ANY ? i : 0] += w * s->d[g][from][x][v + i];
                            }
                        }
                }
#if SCHEME == ANY
                for (int x = 0; x < 8; x++)
                    for (int o = 0; o < OCTETS; o++)  // so that maps take their turn
                        for (int i = 0; i < 2; i++)
                            for (int c = 8 * o; c < 8 * o + 8; c++)
                                d1[8 * y + x][a->reads[g][(v + i) * LANES + c]] += part[x][i][c];
#else
                UNROLL for (int x = 0; x < 8; x++)
                    sum[g][x] = v == 0 ? fold(part[x][0]) : sum[g][x] + fold(part[x][0]);
#endif
            }
        UNROLL for (int x = 0; x < 8; x++) {  // BLOCKS: four maps in two groups each: add them, in all 16 channels
            float *d = d1[8 * y + x];
#if SCHEME == ANY
            for (int c = 12; c < CHANNELS; c++) d[c] = d[c - 12];
#else
            ((unaligned_octet *)d)[0] = sum[0][x] + SHUFFLE_OCTETS(sum[2][x], sum[1][x], 4, 5, 6, 7, 8, 9, 10, 11);
            ((unaligned_octet *)d)[1] = sum[2][x] + SHUFFLE_OCTETS(sum[1][x], sum[0][x], 4, 5, 6, 7, 8, 9, 10, 11);
#endif
            for (int c = 0; c < CHANNELS; c += LANES)
                store(d + c, load(d + c) * power(slope(load(&a->h1[pixel(y + 2, x + 2)][c]))));
        }
    }
}

static void learn_H2(struct learner *l, const struct spread *s, const struct activations *a) {
    for (int g = 0; g < GROUPS; g++)
        for (int v = 0; v < VECTORS; v += 2)
            for (int ky = 0; ky < 5; ky++) {
                vec sum[5][2] = {{{0}}};
                for (int y = 0; y < 4; y++)
                    UNROLL for (int x = 0; x < 4; x++)
                        UNROLL for (int kx = 0; kx < 5; kx++) {
                            int read = pixel(2 * y + ky, 2 * x + kx);
                            sum[kx][0] += power(field(a, g, v, read)) * s->d[g][y][x][v];
                            sum[kx][1] += power(field(a, g, v + 1, read)) * s->d[g][y][x][v + 1];
                        }
                UNROLL for (int kx = 0; kx < 5; kx++)
                    UNROLL for (int i = 0; i < 2; i++)
                        learn(l, &l->net.H2w[g][5 * ky + kx][(v + i) * LANES], sum[kx][i]);
            }
}

static void learn_H1(struct learner *l, float (*d1)[CHANNELS], const float *image) {
    for (int c = 0; c < CHANNELS; c += LANES)
        for (int ky = 0; ky < 5; ky++) {
            vec sum[5] = {{0}};
            for (int y = 0; y < 8; y++)
                UNROLL for (int x = 0; x < 8; x++) {
                    const float *field = image + 20 * (2 * y + ky) + 2 * x;
                    UNROLL for (int kx = 0; kx < 5; kx++)
                        sum[kx] += load(&d1[8 * y + x][c]) * (CURVATURE ? field[kx] * field[kx] : field[kx]);
                }
            UNROLL for (int kx = 0; kx < 5; kx++) learn(l, &l->net.H1w[5 * ky + kx][c], sum[kx]);
        }
}

static void backward(struct learner *l, const float *image, struct activations *a, const float *target) {
    float d[OUT] ALIGNED, d3[H3] ALIGNED, d2[H2] ALIGNED, d1[PIXELS][CHANNELS] ALIGNED;
    struct spread s;
    output_error(a->out, target, d);
    for (int j = 0; j < OUT; j += LANES) learn(l, l->net.outb + j, load(d + j));

    backward_dense(H3, OUT, l, l->net.outw[0], a->h3, d, d3);
    for (int j = 0; j < H3; j += LANES) {
        store(d3 + j, load(d3 + j) * power(slope(load(a->h3 + j))));
        learn(l, l->net.H3b + j, load(d3 + j));
    }

    backward_dense(H2, H3, l, l->net.H3w[0], DROPOUT ? a->kept : a->h2, d3, d2);
    for (int j = 0; j < H2; j += LANES) {
        vec passed = DROPOUT ? load(d2 + j) * load(a->scale + j) : load(d2 + j);
        store(d2 + j, passed * power(slope(load(a->h2 + j))));
        learn(l, l->net.H2b[0] + j, load(d2 + j));
    }

    spread_errors(d2, &s);
    backward_H2(&l->net, &s, a, d1);
    learn_H2(l, &s, a);
    for (int p = 0; p < PIXELS; p++)
        for (int c = 0; c < CHANNELS; c += LANES) learn(l, &l->net.H1b[p][c], load(&d1[p][c]));
    learn_H1(l, d1, image);
}

// What SGD has done already after a single digit. AdamW is Loshchilov and Hutter's, as in PyTorch.
static void update(struct learner *l, struct state *s, int64_t batch) {
#if STORES_GRADIENT
    float *w = (float *)&l->net, *gradient = (float *)&l->gradient;
    const int n = sizeof(struct network) / sizeof(float);
#if BATCH
    const float share = 1.0f / batch;
    for (int i = 0; i < n; i++) gradient[i] *= share;
#endif
#if OPTIMIZER == SGD
    for (int i = 0; i < n; i++) w[i] -= l->lr * gradient[i];
#elif OPTIMIZER == SGD_RATES
    const float *rate = (float *)&l->rate;
    for (int i = 0; i < n; i++) w[i] -= rate[i] * gradient[i];
#elif OPTIMIZER == ADAMW
    float *moment1 = (float *)&l->moment1, *moment2 = (float *)&l->moment2;
    s->beta1_power *= s->beta1;
    s->beta2_power *= s->beta2;
    const float step = s->lr / (1 - s->beta1_power), unbias = 1 / __builtin_sqrt(1 - s->beta2_power);
    const float shrink = 1 - s->lr * s->weight_decay, rest1 = 1 - s->beta1, rest2 = 1 - s->beta2;
    const float epsilon = s->epsilon;
    for (int i = 0; i < n; i++) {
        moment1[i] += rest1 * (gradient[i] - moment1[i]);
        moment2[i] += rest2 * (gradient[i] * gradient[i] - moment2[i]);
        w[i] = shrink * w[i] - step * moment1[i] / (__builtin_sqrtf(moment2[i]) * unbias + epsilon);
    }
#endif
    if (BATCH)
        for (int i = 0; i < n; i++) gradient[i] = 0;
#endif
    (void)l, (void)s, (void)batch;
}

// Chance: SplitMix64 (Steele et al. 2014) of a counter. Word 0 of a presentation moves the digit, words 1 to
// 48 have 16 bits for each unit of H2, in PyTorch's order of its units.

static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static uint64_t random_word(const struct state *s, int word) {
    return mix(mix(s->seed) + (64 * s->presentations + word + 1) * 0x9E3779B97F4A7C15u);
}

static void shift(const struct state *s, const float *image, float *moved) {
    const int reach = s->shift_pixels, moves = 2 * reach + 1;
    const int move = (random_word(s, 0) >> 32) * moves * moves >> 32;
    const int dy = move / moves - reach, dx = move % moves - reach;
    for (int y = 0; y < 16; y++)
        for (int x = 0; x < 16; x++) {
            const int fromy = y - dy, fromx = x - dx;
            const int outside = (fromy | fromx) & ~15;
            moved[20 * (y + 2) + x + 2] =
                SHIFT == PAD && outside ? -1 : image[20 * ((fromy & 15) + 2) + (fromx & 15) + 2];
        }
}

// The unit of H2 in PyTorch's order, (12, 4, 4), that is unit j in ours.
INLINE int plain_unit(int j) { return 64 * (j / 64) + 16 * (j / 4 % 4) + 4 * (j / 16 % 4) + j % 4; }

static void draw_dropout(const struct state *s, float *scale) {
    const uint32_t dropped = 65536 * s->dropout;
    const float kept = 1 / (1 - s->dropout);
    for (int j = 0; j < H2; j += 4) {  // four neighbours in a row are neighbours in both orders
        uint64_t word = random_word(s, 1 + plain_unit(j) / 4);
        UNROLL for (int i = 0; i < 4; i++) scale[j + i] = (word >> (16 * i) & 65535) < dropped ? 0 : kept;
    }
}

// Between PyTorch's layout and ours

static void copy(float *packed, float *plain, int unpack) {
    if (unpack)
        *plain = *packed;
    else
        *packed = *plain;
}

static void exchange(struct network *net, float *const plain[8], int unpack) {
    for (int c = 0; c < CHANNELS; c++) {
        int map = c % 12;
        for (int tap = 0; tap < TAPS; tap++) copy(&net->H1w[tap][c], plain[0] + map * TAPS + tap, unpack);
        for (int p = 0; p < PIXELS; p++) copy(&net->H1b[p][c], plain[1] + map * PIXELS + p, unpack);
    }
    for (int g = 0; g < GROUPS; g++)
        for (int m = 0; m < MAPS; m++)
            for (int c = 0; c < 8; c++)
                for (int tap = 0; tap < TAPS; tap++) {
                    int v = OCTETS == 2 ? m % 2 : m, o = OCTETS == 2 ? m / 2 : 0;  // as map_of has it
                    // Group 2 reads maps 8-11 and 0-3 in our channels, and 0-3 and 8-11 in PyTorch's.
                    int map = 8 * (4 * g + m) + (SCHEME == BLOCKS && g == 2 ? (c + 4) % 8 : c);
                    copy(&net->H2w[g][tap][v * LANES + 8 * o + c], plain[2] + map * TAPS + tap, unpack);
                }
    for (int j = 0; j < H2; j++) {
        copy(net->H2b[0] + j, plain[3] + plain_unit(j), unpack);
        for (int i = 0; i < 30; i++) copy(&net->H3w[j][i], plain[4] + plain_unit(j) * 30 + i, unpack);
    }
    for (int i = 0; i < 30; i++) {
        copy(net->H3b + i, plain[5] + i, unpack);
        for (int j = 0; j < 10; j++) copy(&net->outw[i][j], plain[6] + i * 10 + j, unpack);
    }
    for (int j = 0; j < 10; j++) copy(net->outb + j, plain[7] + j, unpack);
}

// ANY: reads (12, 8) are maps of H1.
static void lay_border(struct activations *a, const int32_t *reads) {
    for (int i = 0; i < BORDERED * BORDERED; i++)
        for (int c = 0; c < CHANNELS; c++) a->h1[i][c] = -1;
#if SCHEME == ANY
    float *fields = a->fields[0][0];
    for (int i = 0; i < GROUPS * BORDERED * BORDERED * MAPS * 8; i++) fields[i] = -1;
    for (int g = 0; g < GROUPS; g++)
        for (int i = 0; i < MAPS * 8; i++)
            a->reads[g][i] = reads[8 * (4 * g + map_of(i / LANES, i % LANES / 8)) + i % 8];
#endif
    (void)reads;
}

// Exported. parameters: pointers to H1w, H1b, H2w, H2b, H3w, H3b, outw, outb, as repro.py has them.

// How many floats a vector holds.
int lanes(void) { return LANES; }

// Present n images (20, 20), borders on, in order, and step after each, or (BATCH) after each `batch` of them
// and after what is left. SGD_RATES: extra1 are the rates; ADAMW: extra1 and extra2 are the moments. Returns 1
// if a parameter is no longer finite, else 0. All it needs lies on the stack, 200 kB at most: threads of 128 kB,
// musl's, are too small for it.
int train_pass(float *const parameters[8], float *const extra1[8], float *const extra2[8], const float *images,
               const float *targets, int64_t n, int64_t batch, const int32_t *reads, struct state *s) {
    struct learner l = {.lr = s->lr};
    struct activations a;
    lay_border(&a, reads);
    exchange(&l.net, parameters, 0);
#if OPTIMIZER == SGD_RATES
    exchange(&l.rate, extra1, 0);
#elif OPTIMIZER == ADAMW
    exchange(&l.moment1, extra1, 0);
    exchange(&l.moment2, extra2, 0);
#endif
#if SHIFT != NONE
    float moved[400];
    for (int i = 0; i < 400; i++) moved[i] = -1;
#endif
    for (int64_t i = 0; i < n; i++) {
        const float *image = images + 400 * i;
#if SHIFT != NONE
        shift(s, image, moved);
        image = moved;
#endif
        if (DROPOUT) draw_dropout(s, a.scale);
        forward(&l.net, image, &a, 1);
        backward(&l, image, &a, targets + 10 * i);
        s->presentations++;
        const int64_t in_batch = BATCH ? i % batch + 1 : 1;
        if (!BATCH || in_batch == batch || i == n - 1) update(&l, s, in_batch);
    }
    exchange(&l.net, parameters, 1);
#if OPTIMIZER == ADAMW
    exchange(&l.moment1, extra1, 1);
    exchange(&l.moment2, extra2, 1);
#endif
    (void)extra1, (void)extra2;
    const float *w = (float *)&l.net;
    for (unsigned i = 0; i < sizeof l.net / sizeof *w; i++)
        if (!__builtin_isfinite(w[i])) return 1;
    return 0;
}

// The outputs (n, 10) for n images (20, 20).
void compute_outputs(float *const parameters[8], const float *images, int64_t n, const int32_t *reads, float *outputs) {
    struct network net = {0};
    struct activations a;
    lay_border(&a, reads);
    exchange(&net, parameters, 0);
    for (int64_t i = 0; i < n; i++) {
        forward(&net, images + 400 * i, &a, 0);
        for (int j = 0; j < 10; j++) outputs[10 * i + j] = a.out[j];
    }
}

#if CURVATURE
#if LOSS != MSE
#error "The Gauss-Newton diagonal is of the mean squared error."
#endif
// The diagonal for n images (20, 20), summed over them and over the connections that share a weight.
void measure_curvature(float *const parameters[8], const float *images, int64_t n, const int32_t *reads,
                       float *const diagonal[8]) {
    struct learner l = {0};
    struct activations a;
    lay_border(&a, reads);
    exchange(&l.net, parameters, 0);
    for (int64_t i = 0; i < n; i++) {
        forward(&l.net, images + 400 * i, &a, 0);
        backward(&l, images + 400 * i, &a, a.out);
    }
    exchange(&l.gradient, diagonal, 1);
}
#endif
