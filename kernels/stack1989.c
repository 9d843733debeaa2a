// The network of LeCun et al. 1989, trained one digit at a time, hundreds of replicas at once: C and CUDA in one.
//
// repro.py says what is right, convnet1989.c is fast on a CPU, and this is for a GPU. One digit gives a GPU far
// too little to do; hundreds of replicas, each at its own digit, keep it busy. So a replica is a block of threads,
// which keeps the network and all activations in the shared memory of a multiprocessor from digit to digit.
//
// Training is a sequence of phases. A phase is a number of tasks that may run in any order or at the same time,
// EACH(task, of how many), and ends at a BARRIER, where every thread waits for all others. In CUDA, EACH shares
// the tasks out among the threads of the block; in C it is a plain loop, and the barrier is nothing. So any CPU
// runs the very source that a GPU runs. All arithmetic is made of operations that IEEE 754 rounds, and compilers
// may not fuse them (gcc -ffp-contract=off, NVRTC -fmad=false), so both give the same bits; only the log in the
// sum of a cross-entropy is the library's. NVRTC -use_fast_math gives up the bits for speed.
//
// One variant is compiled at a time, chosen by -D; a step is taken after each digit:
//   LOSS        MSE: squashed outputs, mean squared error  |  CROSS_ENTROPY: logits, softmax
//   ACTIVATION  TANH  |  SCALED_TANH: 1.7159 tanh(2x/3), outputs of MSE too  |  RELU: of hidden units
//   OPTIMIZER   SGD: one learning rate  |  SGD_RATES: one for each parameter  |  ADAMW
//               |  CURVATURE: not to train, but to measure how the loss curves, for rates
//   SHIFT       NONE  |  each digit moved by up to so many pixels both ways: ROLL, wrapping as torch.roll
//               does, or PAD, moving the background in
//   DROPOUT     0  |  1: of H2's outputs, while training
// and for CUDA alone
//   THREADS     in a block; the results do not depend on it
//   BLOCKS      that a multiprocessor is to hold, so that the compiler saves registers
//
// The layout. With several blocks on a multiprocessor, shared memory is expected to be what they wait for. It gives
// or takes 32 words a clock, one from each of its 32 banks. Therefore:
// - A task keeps a tile of sums in registers. Where layers are convolutions, it uses what it reads many times.
// - A task reads 16 bytes at a time where it can. The hardware then serves eight threads at a time, and the units
//   of 16 bytes that these read should be distinct modulo 8, or the same. So it is 148 floats, 37 units, from one
//   map of H1 to the next, of which 144 are in use; 68 (of 64) for its errors and biases; 208 (of 192) for parts of
//   H2's sums. The weights of the four maps of H2 that read the same maps lie side by side, 25 units from the next.
// - Tasks are numbered so that two neighbours read one of their operands from the same place, which one access
//   may then serve.
// - What is in global memory, struct extra, lies in the order in which neighbouring tasks take it.
// Shared memory also decides how many blocks fit: with at most 57,344 bytes, four on an H100.

enum { MSE, CROSS_ENTROPY, TANH, SCALED_TANH, RELU, SGD, SGD_RATES, ADAMW, CURVATURE, NONE, ROLL, PAD };

#ifdef __CUDACC__
#define INLINE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ALIGNED(bytes) __align__(bytes)
#define EACH(t, n) for (int t = threadIdx.x; t < (n); t += THREADS)
#define EACH_FROM_LAST(t, n) for (int t = THREADS - 1 - threadIdx.x; t < (n); t += THREADS)
#define BARRIER __syncthreads()
#else
#include <math.h>
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define ALIGNED(bytes) __attribute__((aligned(bytes), may_alias))
#ifndef EACH  // tests have others: backwards, and of real threads
#define EACH(t, n) for (int t = 0; t < (n); t++)
#define EACH_FROM_LAST EACH
#define BARRIER
#endif
#endif

typedef unsigned long long word;  // 64 bits

struct ALIGNED(8) two {
    float x[2];
};

struct ALIGNED(16) four {
    float x[4];
};

// The parameters. A group is the four maps of H2 that read the same eight maps of H1.
struct network {
    float H1w[12][25];
    float H1b[12][68];
    struct four H2w[3][8][25];  // [group][which of the eight][tap].x[map in the group]
    float H2b[192];             // units in the order of repro.py: [map][y][x]
    float H3w[192][30];
    float H3b[32];
    float outw[30][10];
    float outb[12];
};

// What goes with each parameter: its rate, a moment (two of these for ADAMW), or its curvature.
struct extra {
    float H1w[5][12 * 5];       // [kx][task]
    struct four H1b[12 * 16];
    struct four H2w[5][3 * 5 * 8];  // [kx][task]
    float H2b[192];
    struct two H3w[15][192];  // [pair][task]
    float H3b[32];
    struct two outw[5][30];  // [pair][task]
    float outb[12];
};

#define FLOATS(type) ((int)(sizeof(struct type) / sizeof(float)))
#define EXTRAS (OPTIMIZER == SGD ? 0 : OPTIMIZER == ADAMW ? 2 : 1)

// The shared memory of a block. An error, d, is the derivative of the loss by a unit's sum.
struct ALIGNED(16) memory {
    struct network net;
    float image[20][20];  // with its border
    float target[12];
    float h1[12][148];  // 12 x 12, with a border of -1
    float h2[192];      // as H3 reads them: after dropout
    float d2[192];      // until they are known: slope and dropout, which will be factors of them
    float h3[32], d3[32];
    float out[12], d[12];
    union {  // of which one is in use at a time
        float part2[8][208], part3[8][32];
        float d1[12][68];
    } u;
};

// What a launch is given, by value. A kernel uses only what it needs.
struct job {
    float *net;            // (replicas, FLOATS(network))
    float *extra;          // (replicas, EXTRAS * FLOATS(extra))
    const float *images;   // (digits, 20, 20), with their border
    const float *targets;  // (digits, 10)
    const int *order;      // (replicas, n): the digits to present, or NULL: 0 to n - 1
    const word *seeds;     // (replicas)
    const float *steps;    // ADAMW, (n, 2): learning rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    float *outputs;        // evaluate: (replicas, n, 10), or NULL
    double *loss;          // evaluate: (replicas), to which the sum over the digits is added
    long long *misses;     // evaluate: (replicas), likewise
    int *places;           // layout: (2, 9760)
    long long n, presentations;             // of this launch, and before it
    float lr, shrink, rest1, rest2, epsilon;  // ADAMW: 1 - lr * weight_decay, 1 - beta1, 1 - beta2
    float kept;                             // 1 / (1 - dropout)
    int dropped, shift_pixels;              // 65536 * dropout; how far, at most
};

// What a block knows of its replica.
struct replica {
    const struct job *job;
    struct extra *extra;
    word seed;
    long long presentation;  // which it is in training; NOT_TRAINING where nothing is random
    float step, unbias;      // ADAMW: the row of job.steps
};

#define NOT_TRAINING -1

// Copy `count` floats to registers or from them, `wide` at a time: 1, 2 or 4.

INLINE void read(float *to, const float *from, int count, int wide) {
    UNROLL for (int i = 0; i < count; i += wide) {
        if (wide == 1) to[i] = from[i];
        if (wide == 2) {
            const struct two two = *(const struct two *)(from + i);
            to[i] = two.x[0], to[i + 1] = two.x[1];
        }
        if (wide == 4) {
            const struct four four = *(const struct four *)(from + i);
            UNROLL for (int j = 0; j < 4; j++) to[i + j] = four.x[j];
        }
    }
}

INLINE void write(float *to, const float *from, int count, int wide) {
    UNROLL for (int i = 0; i < count; i += wide) {
        if (wide == 1) to[i] = from[i];
        if (wide == 2) {
            const struct two two = {{from[i], from[i + 1]}};
            *(struct two *)(to + i) = two;
        }
        if (wide == 4) {
            const struct four four = {{from[i], from[i + 1], from[i + 2], from[i + 3]}};
            *(struct four *)(to + i) = four;
        }
    }
}

// Activation functions, and their slopes where the value is y

// x P(x^2) / Q(x^2), fitted for the least largest relative error up to 7.9; there tanh is 1 - 2.7e-7.
INLINE float tanh_of(float x) {
    x = x > 7.9f ? 7.9f : x;  // NaN stays NaN
    x = x < -7.9f ? -7.9f : x;
    const float u = x * x;
    float p = fmaf(1.54279644e-08f, u, 2.20232394e-05f), q = fmaf(8.59877675e-07f, u, 0.000342364999f);
    p = fmaf(fmaf(fmaf(p, u, 0.00357899169f), u, 0.134506203f), u, 1.0f);
    q = fmaf(fmaf(fmaf(q, u, 0.0261922367f), u, 0.467839483f), u, 1.0f);
    return x * p / q;
}

INLINE float squash(float x) { return ACTIVATION == SCALED_TANH ? 1.7159f * tanh_of(2.0f / 3 * x) : tanh_of(x); }
INLINE float squash_slope(float y) {
    return ACTIVATION == SCALED_TANH ? fmaf(-2.0f / 3 / 1.7159f * y, y, 1.7159f * 2 / 3) : fmaf(-y, y, 1.0f);
}

INLINE float activate(float x) { return ACTIVATION != RELU ? squash(x) : x < 0.0f ? 0.0f : x; }
INLINE float slope(float y) { return ACTIVATION != RELU ? squash_slope(y) : y > 0.0f ? 1.0f : 0.0f; }

// e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2, a polynomial fitted for the least largest relative error.
INLINE float exp_of(float x) {
    union {
        float value;
        unsigned bits;
    } n, e;
    x = x < -87.0f ? -87.0f : x;
    n.value = fmaf(1.44269504f, x, 12582912.0f);  // 1.5 * 2^23: rounds, and leaves n in the last bits
    const float whole = n.value - 12582912.0f;
    const float r = fmaf(whole, 2.12194440e-4f, fmaf(whole, -0.693359375f, x));  // ln 2, in two parts
    const float p = fmaf(fmaf(fmaf(0.00138368461f, r, 0.00837481601f), r, 0.0416682256f), r, 0.166664202f);
    e.value = fmaf(fmaf(fmaf(p, r, 0.499999921f), r, 1.00000004f), r, 1.0f);
    e.bits += n.bits << 23;
    return e.value;
}

// Chance: SplitMix64 (Steele et al. 2014) of a counter. Word 0 of a presentation moves the digit, words 1 to
// 48 have 16 bits for each unit of H2.

INLINE word mix(word z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

INLINE word random_word(const struct replica *r, int number) {
    return mix(mix(r->seed) + (64 * (word)r->presentation + number + 1) * 0x9E3779B97F4A7C15u);
}

// Forward

INLINE void forward_image(struct memory *s, const struct replica *r, long long digit) {
    const float *image = r->job->images + 400 * digit, *target = r->job->targets + 10 * digit;
    int down = 0, right = 0;
    if (SHIFT != NONE && r->presentation != NOT_TRAINING) {
        const int most = r->job->shift_pixels, moves = 2 * most + 1;
        const int move = (random_word(r, 0) >> 32) * moves * moves >> 32;
        down = move / moves - most, right = move % moves - most;
    }
    EACH(pixel, 20 * 20) {
        const int y = pixel / 20, x = pixel % 20;
        float value = image[pixel];
        if (SHIFT != NONE && y >= 2 && y < 18 && x >= 2 && x < 18) {
            const int from_y = y - 2 - down, from_x = x - 2 - right, outside = (from_y | from_x) & ~15;
            value = SHIFT == PAD && outside ? -1 : image[20 * ((from_y & 15) + 2) + (from_x & 15) + 2];
        }
        s->image[y][x] = value;
    }
    EACH(j, 10) s->target[j] = target[j];
    BARRIER;
}

// A task is a row of two maps of H1.
INLINE void forward_H1(struct memory *s) {
    EACH(t, 6 * 8) {
        const int maps = 2 * (2 * (t / 16) + t % 2), y = t / 2 % 8;
        float sum[2][8], field[20];
        UNROLL for (int m = 0; m < 2; m++) read(sum[m], &s->net.H1b[maps + m][8 * y], 8, 4);
        for (int ky = 0; ky < 5; ky++) {
            read(field, s->image[2 * y + ky], 20, 4);
            UNROLL for (int kx = 0; kx < 5; kx++)
                UNROLL for (int m = 0; m < 2; m++) {
                    const float weight = s->net.H1w[maps + m][5 * ky + kx];
                    UNROLL for (int x = 0; x < 8; x++) sum[m][x] = fmaf(weight, field[2 * x + kx], sum[m][x]);
                }
        }
        UNROLL for (int m = 0; m < 2; m++) {
            UNROLL for (int x = 0; x < 8; x++) sum[m][x] = activate(sum[m][x]);
            write(&s->h1[maps + m][12 * (y + 2) + 2], sum[m], 8, 2);
        }
    }
    BARRIER;
}

// The map of H1 that is number i of those that a group reads, of which it has the weights in this order.
INLINE int read_by(int group, int i) { return (4 * group + i) % 12; }

// A task is a row of the four maps of a group, as far as it comes from one map of H1; then it is a row of a map.
INLINE void forward_H2(struct memory *s, const struct replica *r) {
    EACH(t, 3 * 8 * 4) {
        const int group = t / 32, i = t / 4 % 8, y = t % 4;
        float sum[4][4] = {{0}}, field[12];
        for (int ky = 0; ky < 5; ky++) {
            read(field, &s->h1[read_by(group, i)][12 * (2 * y + ky)], 12, 4);
            UNROLL for (int kx = 0; kx < 5; kx++) {
                const struct four weight = s->net.H2w[group][i][5 * ky + kx];
                UNROLL for (int map = 0; map < 4; map++)
                    UNROLL for (int x = 0; x < 4; x++)
                        sum[map][x] = fmaf(weight.x[map], field[2 * x + kx], sum[map][x]);
            }
        }
        UNROLL for (int map = 0; map < 4; map++)
            write(&s->u.part2[i][16 * (4 * group + map) + 4 * y], sum[map], 4, 4);
    }
    BARRIER;
    EACH(row, 12 * 4) {
        float sum[4], part[4], passed[4];
        word random = 0;
        read(sum, &s->net.H2b[4 * row], 4, 4);
        UNROLL for (int i = 0; i < 8; i++) {
            read(part, &s->u.part2[i][4 * row], 4, 4);
            UNROLL for (int x = 0; x < 4; x++) sum[x] += part[x];
        }
        const int drop = DROPOUT && r->presentation != NOT_TRAINING;
        if (drop) random = random_word(r, 1 + row);
        UNROLL for (int x = 0; x < 4; x++) {
            const int bits = random >> 16 * x & 65535;
            const float scale = !drop ? 1 : bits < r->job->dropped ? 0 : r->job->kept;
            sum[x] = activate(sum[x]);
            passed[x] = slope(sum[x]) * scale;
            sum[x] *= scale;
        }
        write(&s->h2[4 * row], sum, 4, 4);
        write(&s->d2[4 * row], passed, 4, 4);
    }
    BARRIER;
}

// A task is a unit's sum, as far as it comes from 24 units of H2; then it is a unit.
INLINE void forward_H3(struct memory *s) {
    EACH(t, 8 * 32) {
        const int part = t / 32, j = t % 32;
        if (j < 30) {
            float sum = 0, h2[24];
            read(h2, &s->h2[24 * part], 24, 4);
            UNROLL for (int i = 0; i < 24; i++) sum = fmaf(h2[i], s->net.H3w[24 * part + i][j], sum);
            s->u.part3[part][j] = sum;
        }
    }
    BARRIER;
    EACH(j, 30) {
        float sum = s->net.H3b[j];
        UNROLL for (int part = 0; part < 8; part++) sum += s->u.part3[part][j];
        s->h3[j] = activate(sum);
    }
    BARRIER;
}

INLINE void forward_outputs(struct memory *s) {
    EACH(j, 10) {
        float sum = s->net.outb[j];
        UNROLL for (int k = 0; k < 30; k++) sum = fmaf(s->h3[k], s->net.outw[k][j], sum);
        s->out[j] = LOSS == MSE ? squash(sum) : sum;
    }
    BARRIER;
}

// The outputs (CROSS_ENTROPY: logits) for a digit.
INLINE void forward(struct memory *s, const struct replica *r, long long digit) {
    forward_image(s, r, digit);
    forward_H1(s);
    forward_H2(s, r);
    forward_H3(s);
    forward_outputs(s);
}

// Backward. Each parameter takes its step as soon as nothing else needs it.
// CURVATURE: the diagonal of the Gauss-Newton matrix (LeCun et al. 1998, appendix C: the second derivatives,
// without the terms of f'') is propagated back as gradients are, with weights, inputs and slopes squared: that
// is all that `power` is for.

INLINE float power(float x) { return OPTIMIZER == CURVATURE ? x * x : x; }

// The step of `count` parameters, 1, 2 or 4. AdamW is Loshchilov and Hutter's, as in PyTorch.
INLINE void learn(const struct replica *r, float *weights, float *extra, const float *gradient, int count) {
    const struct job *job = r->job;
    float w[4], e[4], f[4], *extra2 = extra + FLOATS(extra);
    read(w, weights, count, count);
    if (EXTRAS > 0) read(e, extra, count, count);
    if (EXTRAS > 1) read(f, extra2, count, count);
    UNROLL for (int i = 0; i < count; i++) {
        if (OPTIMIZER == SGD) w[i] = fmaf(-job->lr, gradient[i], w[i]);
        if (OPTIMIZER == SGD_RATES) w[i] = fmaf(-e[i], gradient[i], w[i]);
        if (OPTIMIZER == ADAMW) {
            e[i] = fmaf(job->rest1, gradient[i] - e[i], e[i]);
            f[i] = fmaf(job->rest2, fmaf(gradient[i], gradient[i], -f[i]), f[i]);
            w[i] = fmaf(job->shrink, w[i], -r->step * e[i] / fmaf(sqrtf(f[i]), r->unbias, job->epsilon));
        }
        if (OPTIMIZER == CURVATURE) e[i] += gradient[i];
    }
    if (OPTIMIZER != CURVATURE) write(weights, w, count, count);
    if (OPTIMIZER == ADAMW || OPTIMIZER == CURVATURE) write(extra, e, count, count);
    if (OPTIMIZER == ADAMW) write(extra2, f, count, count);
}

// A task is an output.
INLINE void backward_loss(struct memory *s, const struct replica *r) {
    EACH(j, 10) {
        float d;
        if (LOSS == MSE) {
            const float off = OPTIMIZER == CURVATURE ? 1 : s->out[j] - s->target[j];
            d = 2.0f / 10 * off * power(squash_slope(s->out[j]));
        } else {
            float highest = s->out[0], sum = 0;
            UNROLL for (int i = 1; i < 10; i++) highest = s->out[i] > highest ? s->out[i] : highest;
            UNROLL for (int i = 0; i < 10; i++) sum += exp_of(s->out[i] - highest);
            d = exp_of(s->out[j] - highest) / sum - s->target[j];
        }
        s->d[j] = d;
        learn(r, &s->net.outb[j], &r->extra->outb[j], &d, 1);
    }
    BARRIER;
}

// The sum of d (the errors of the units that read a unit), each times its weight; then the weights learn.
// `x` is the unit's activity; weights and d come in pairs, and so do the extras, which are `stride` pairs apart.
INLINE float backward_unit(const struct replica *r, float x, float *weights, const float *d, struct two *extra,
                           int pairs, int stride) {
    float sum = 0, w[2], e[2];
    UNROLL for (int i = 0; i < pairs; i++) {
        read(w, weights + 2 * i, 2, 2);
        read(e, d + 2 * i, 2, 2);
        sum = fmaf(power(w[1]), e[1], fmaf(power(w[0]), e[0], sum));
        const float gradient[2] = {power(x) * e[0], power(x) * e[1]};
        learn(r, weights + 2 * i, extra[stride * i].x, gradient, 2);
    }
    return sum;
}

// A task is a unit of H3, with the weights that read it.
INLINE void backward_outputs(struct memory *s, const struct replica *r) {
    EACH(k, 30) {
        float d = backward_unit(r, s->h3[k], s->net.outw[k], s->d, &r->extra->outw[0][k], 5, 30);
        d *= power(slope(s->h3[k]));
        s->d3[k] = d;
        learn(r, &s->net.H3b[k], &r->extra->H3b[k], &d, 1);
    }
    BARRIER;
}

// A task is a unit of H2, with the weights that read it.
INLINE void backward_H3(struct memory *s, const struct replica *r) {
    EACH(k, 192) {
        float d = backward_unit(r, s->h2[k], s->net.H3w[k], s->d3, &r->extra->H3w[0][k], 15, 192);
        d *= power(s->d2[k]);
        s->d2[k] = d;
        learn(r, &s->net.H2b[k], &r->extra->H2b[k], &d, 1);
    }
    BARRIER;
}

// A task is two rows of a map of H1, 2a and 2a + 1. Two groups read the map, by their rows a - 1 to a + 1.
INLINE void backward_H2(struct memory *s) {
    EACH(t, 12 * 4) {
        const int map = t / 4, a = t % 4;
        float sum[2][8] = {{0}}, d[4][4], h1[8];
        for (int half = 0; half < 2; half++) {  // the map is one of the first four that a group reads, or the last
            const int group = (map / 4 + 2 * half) % 3, i = map % 4 + 4 * half;
            for (int y = a - 1; y <= a + 1; y++) {
                if (y < 0 || y > 3) continue;
                UNROLL for (int m = 0; m < 4; m++) read(d[m], &s->d2[16 * (4 * group + m) + 4 * y], 4, 4);
                UNROLL for (int odd = 0; odd < 2; odd++) {
                    const int ky = 2 * (a - y) + 2 + odd;  // row y reads row 2a + odd with this row of its kernel
                    if (ky > 4) continue;
                    UNROLL for (int kx = 0; kx < 5; kx++) {
                        const struct four weight = s->net.H2w[group][i][5 * ky + kx];
                        UNROLL for (int m = 0; m < 4; m++)
                            UNROLL for (int x = 0; x < 4; x++) {
                                const int to = 2 * x + kx - 2;
                                if (to >= 0 && to < 8) sum[odd][to] = fmaf(power(weight.x[m]), d[m][x], sum[odd][to]);
                            }
                    }
                }
            }
        }
        UNROLL for (int odd = 0; odd < 2; odd++) {
            read(h1, &s->h1[map][12 * (2 * a + odd + 2) + 2], 8, 2);
            UNROLL for (int x = 0; x < 8; x++) sum[odd][x] *= power(slope(h1[x]));
            write(&s->u.d1[map][8 * (2 * a + odd)], sum[odd], 8, 4);
        }
    }
    BARRIER;
}

// A task is a row of H2's kernels, in all four maps of a group, for one map of H1.
INLINE void learn_H2(struct memory *s, const struct replica *r) {
    EACH(t, 3 * 5 * 8) {
        const int group = t / 40, ky = t / 8 % 5, i = t % 8;
        float sum[5][4] = {{0}}, field[12], d[4][4];
        for (int y = 0; y < 4; y++) {
            read(field, &s->h1[read_by(group, i)][12 * (2 * y + ky)], 12, 4);
            UNROLL for (int m = 0; m < 4; m++) read(d[m], &s->d2[16 * (4 * group + m) + 4 * y], 4, 4);
            UNROLL for (int x = 0; x < 4; x++)
                UNROLL for (int kx = 0; kx < 5; kx++)
                    UNROLL for (int m = 0; m < 4; m++)
                        sum[kx][m] = fmaf(power(field[2 * x + kx]), d[m][x], sum[kx][m]);
        }
        UNROLL for (int kx = 0; kx < 5; kx++)
            learn(r, s->net.H2w[group][i][5 * ky + kx].x, r->extra->H2w[kx][t].x, sum[kx], 4);
    }
}

// A task is a row of a kernel of H1; then, four biases. The rows go to threads that learn_H2 needs least.
INLINE void learn_H1(struct memory *s, const struct replica *r) {
    EACH_FROM_LAST(t, 5 * 12) {
        const int map = t % 12, ky = t / 12;
        float sum[5] = {0}, field[20], d[8];
        for (int y = 0; y < 8; y++) {
            read(field, s->image[2 * y + ky], 20, 4);
            read(d, &s->u.d1[map][8 * y], 8, 4);
            UNROLL for (int x = 0; x < 8; x++)
                UNROLL for (int kx = 0; kx < 5; kx++) sum[kx] = fmaf(power(field[2 * x + kx]), d[x], sum[kx]);
        }
        UNROLL for (int kx = 0; kx < 5; kx++)
            learn(r, &s->net.H1w[map][5 * ky + kx], &r->extra->H1w[kx][t], &sum[kx], 1);
    }
    EACH(t, 12 * 16) {
        float d[4];
        read(d, &s->u.d1[t / 16][t % 16 * 4], 4, 4);
        learn(r, &s->net.H1b[t / 16][t % 16 * 4], r->extra->H1b[t].x, d, 4);
    }
}

INLINE void backward(struct memory *s, const struct replica *r) {
    backward_loss(s, r);
    backward_outputs(s, r);
    backward_H3(s, r);
    backward_H2(s);
    learn_H2(s, r);
    learn_H1(s, r);
    BARRIER;
}

// Kernels: what a block does for its replica

INLINE void enter(struct memory *s, const struct job *job, int number) {
    const struct four *net = (const struct four *)(job->net + (long long)number * FLOATS(network));
    EACH(i, FLOATS(network) / 4) ((struct four *)&s->net)[i] = net[i];
    EACH(i, 12 * 148) s->h1[i / 148][i % 148] = -1;  // the border; forward_image has the barrier for both
}

// Present n digits, and step after each; or (CURVATURE) add up how the loss of each curves.
INLINE void train_replica(struct memory *s, const struct job *job, int number) {
    struct replica r = {job, (struct extra *)job->extra + (long long)number * EXTRAS, 0, NOT_TRAINING, 0, 0};
    if (OPTIMIZER != CURVATURE) r.seed = job->seeds[number];
    enter(s, job, number);
    for (long long i = 0; i < job->n; i++) {
        if (OPTIMIZER != CURVATURE) r.presentation = job->presentations + i;
        if (OPTIMIZER == ADAMW) r.step = job->steps[2 * i], r.unbias = job->steps[2 * i + 1];
        forward(s, &r, job->order ? job->order[number * job->n + i] : i);
        backward(s, &r);
    }
    if (OPTIMIZER != CURVATURE) {
        struct four *net = (struct four *)(job->net + (long long)number * FLOATS(network));
        EACH(i, FLOATS(network) / 4) net[i] = ((struct four *)&s->net)[i];
    }
}

// The loss of n digits and how many are missed, with the highest output for another digit than the target.
INLINE void evaluate_replica(struct memory *s, const struct job *job, int number) {
    const struct replica r = {job, 0, 0, NOT_TRAINING, 0, 0};
    double loss = 0;  // these two are of the thread that takes the task
    long long misses = 0;
    enter(s, job, number);
    for (long long i = 0; i < job->n; i++) {
        forward(s, &r, i);
        if (job->outputs)
            EACH(j, 10) job->outputs[10 * (number * job->n + i) + j] = s->out[j];
        EACH(t, 1) {
            int answer = 0, label = 0;
            double sum = 0;
            for (int j = 1; j < 10; j++) {
                if (s->out[j] > s->out[answer]) answer = j;
                if (s->target[j] > s->target[label]) label = j;
            }
            for (int j = 0; j < 10; j++) {
                const double off = s->out[j] - s->target[j];
                sum += LOSS == MSE ? off * off / 10 : exp_of(s->out[j] - s->out[answer]);
            }
            if (LOSS == MSE) {
                loss += sum;
            } else {
                const double log_sum = s->out[answer] + log(sum);
                for (int j = 0; j < 10; j++) loss += s->target[j] * (log_sum - s->out[j]);
            }
            misses += answer != label;
        }
        BARRIER;
    }
    EACH(t, 1) job->loss[number] += loss, job->misses[number] += misses;
}

// Where the parameters, in the order of repro.py, lie in a struct network and in a struct extra.
INLINE void layout_replica(struct memory *s, const struct job *job, int number) {
    const struct network *net = &s->net;
    const struct extra *extra = (const struct extra *)s;
    int *places = job->places;
    (void)number;
#define PLACE(first, count, in_network, in_extra)                         \
    EACH(i, count) {                                                      \
        places[first + i] = &net->in_network - (float *)net;              \
        places[9760 + first + i] = &extra->in_extra - (float *)extra;     \
    }
    PLACE(0, 300, H1w[i / 25][i % 25], H1w[i % 5][i / 25 + 12 * (i / 5 % 5)])
    PLACE(300, 768, H1b[i / 64][i % 64], H1b[i / 4].x[i % 4])
#define GROUP (i / 800)
#define MAP (i / 200 % 4)
#define FROM ((i / 25 + GROUP / 2 * 4) % 8)  // group 2 reads maps 8 to 11, then 0 to 3; repro.py has 0 to 3 first
    PLACE(1068, 2400, H2w[GROUP][FROM][i % 25].x[MAP], H2w[i % 5][40 * GROUP + 8 * (i / 5 % 5) + FROM].x[MAP])
    PLACE(3468, 192, H2b[i], H2b[i])
    PLACE(3660, 5760, H3w[i / 30][i % 30], H3w[i % 30 / 2][i / 30].x[i % 2])
    PLACE(9420, 30, H3b[i], H3b[i])
    PLACE(9450, 300, outw[i / 10][i % 10], outw[i % 10 / 2][i / 10].x[i % 2])
    PLACE(9750, 10, outb[i], outb[i])
}

#ifdef __CUDACC__
#define CONSTANT(name, value) extern "C" __constant__ int name = value;
#define KERNEL(name)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const struct job job) { \
        extern __shared__ struct four shared[];                                                \
        name##_replica((struct memory *)shared, &job, blockIdx.x);                             \
    }
#else
#define CONSTANT(name, value) const int name = value;
#ifndef KERNEL
#define KERNEL(name)                                                                               \
    void name(struct job job, long long replicas) {                                                \
        struct memory memory;                                                                      \
        for (int number = 0; number < replicas; number++) name##_replica(&memory, &job, number); \
    }
#endif
#endif

CONSTANT(shared_bytes, sizeof(struct memory))
CONSTANT(net_floats, FLOATS(network))
CONSTANT(extra_floats, EXTRAS * FLOATS(extra))
KERNEL(train)
KERNEL(evaluate)
KERNEL(layout)
