// What Forward-Forward does between its matrix products, each in one pass over memory.
//
// forward_forward.py defines what is right, in PyTorch (TorchOps), which also computes the products. Here is
// the rest: bias, label, ReLU, goodness and normalisation; the step; and the jitter of images. With -DBF16=1,
// activities, gradients and the weights to multiply by are bfloat16, of which a processor multiplies twice as
// many. Sums, and the weights that learn, are float32 all the same.
//
// No function keeps anything from call to call, so that threads may call at once.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if __AVX512F__
#define LANES 16
#else
#define LANES 8  // GCC compares longer vectors than the processor has number by number
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES)));

#if BF16
typedef uint16_t number;  // the upper half of a float

INLINE vec widen(const number *p) {
    half_vec upper;
    memcpy(&upper, p, sizeof upper);
    return (vec)(__builtin_convertvector(upper, uvec) << 16);
}

// To the nearest, ties to even, as PyTorch rounds. NaN stays NaN.
INLINE void narrow(number *p, vec x) {
    uvec bits = (uvec)x;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ivec is_number = x == x;
    half_vec upper = __builtin_convertvector(((uvec)is_number & rounded) | (~(uvec)is_number & 0x7fc0), half_vec);
    memcpy(p, &upper, sizeof upper);
}
#else
typedef float number;

INLINE vec widen(const number *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void narrow(number *p, vec x) { memcpy(p, &x, sizeof x); }
#endif

// The same for the last vector of a row, which has only so many lanes; the others read 0.

INLINE vec load(const number *p, int64_t lanes) {
    if (lanes >= LANES) return widen(p);
    number padded[LANES] = {0};
    memcpy(padded, p, lanes * sizeof *p);
    return widen(padded);
}

INLINE void store(number *p, vec x, int64_t lanes) {
    if (lanes >= LANES) {
        narrow(p, x);
        return;
    }
    number padded[LANES];
    narrow(padded, x);
    memcpy(p, padded, lanes * sizeof *p);
}

INLINE vec load_float(const float *p, int64_t lanes) {
    vec x = {0};
    if (lanes >= LANES)
        memcpy(&x, p, sizeof x);
    else
        memcpy(&x, p, lanes * sizeof *p);
    return x;
}

INLINE void store_float(float *p, vec x, int64_t lanes) {
    if (lanes >= LANES)
        memcpy(p, &x, sizeof x);
    else
        memcpy(p, &x, lanes * sizeof *p);
}

INLINE float sum(vec x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}

// x where it is positive, else 0. NaN stays NaN.
INLINE vec relu(vec x) { return (vec)((ivec)x & ~(x < 0)); }

// Random bits from different x: the hash lowbias32 (Wellons 2018, nullprogram.com/blog/2018/07/31).
INLINE uvec hash(uvec x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// h[r] = relu(products[r mod m] + added[labels[r]]), r < n; goodness[r] is the sum of its squares, or, where
// `linear`, of h itself; passed_on[r] is h[r] by the root of the mean of its squares (NULL: not wanted). Where
// there are keys, it is 0 in places whose random bits are below `dropped`, and else `scaled` up.
void activate(const number *restrict products, int64_t m, const float *restrict added,
              const int64_t *restrict labels, int64_t n, int64_t width, int64_t linear,
              const int64_t *restrict keys, int64_t dropped, float scaled, number *restrict h,
              number *restrict passed_on, float *restrict goodness) {
    uvec columns;
    for (int lane = 0; lane < LANES; lane++) columns[lane] = lane * 0x9e3779b9u;
    for (int64_t r = 0; r < n; r++) {
        const number *from = products + r % m * width;
        const float *add = added + labels[r] * width;
        number *to = h + r * width;
        vec squares = {0}, total = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            vec x = relu(load(from + i, width - i) + load_float(add + i, width - i));
            store(to + i, x, width - i);
            squares += x * x;
            total += x;
        }
        float square = sum(squares);
        goodness[r] = linear ? sum(total) : square;
        if (!passed_on) continue;
        float scale = 1 / sqrtf(square / (float)width + 1e-8f);
        for (int64_t i = 0; i < width; i += LANES) {
            vec x = scale * load(to + i, width - i);
            if (keys) {
                uvec bits = hash(columns + ((uint32_t)keys[r] + (uint32_t)i * 0x9e3779b9u));
                x = (vec)((ivec)(scaled * x) & (ivec)(bits >= (uint32_t)dropped));
            }
            store(passed_on + r * width + i, x, width - i);
        }
    }
}

// One step up the gradient, which comes as so many parts: `velocity` smooths scale * their sum; the weights
// decay and follow it; weights_lowp are the weights to multiply by.
void update(float *restrict weights, float *restrict velocity, number *restrict weights_lowp,
            const number *const *gradients, int64_t count, int64_t n, float scale, float momentum, float lr,
            float weight_decay) {
    float kept = 1 - lr * weight_decay, fresh = (1 - momentum) * scale;
    for (int64_t i = 0; i < n; i += LANES) {
        vec gradient = load(gradients[0] + i, n - i);
        for (int64_t part = 1; part < count; part++) gradient += load(gradients[part] + i, n - i);
        vec v = momentum * load_float(velocity + i, n - i) + fresh * gradient;
        vec w = kept * load_float(weights + i, n - i) + lr * v;
        store_float(velocity + i, v, n - i);
        store_float(weights + i, w, n - i);
        store(weights_lowp + i, w, n - i);
    }
}

// shifted[r] is image chosen[r] moved down by shifts[r][0] rows and right by shifts[r][1] columns; 0 comes in,
// and the first ten inputs, where the label goes, are 0.
void shift(const number *restrict images, int64_t height, int64_t width, const int64_t *restrict chosen,
           const int64_t *restrict shifts, int64_t n, number *restrict shifted) {
    memset(shifted, 0, n * height * width * sizeof *shifted);
    for (int64_t r = 0; r < n; r++) {
        const number *from = images + chosen[r] * height * width;
        number *to = shifted + r * height * width;
        int64_t down = shifts[2 * r], right = shifts[2 * r + 1];
        int64_t left_out = right < 0 ? -right : 0, start = right > 0 ? right : 0, length = width - left_out - start;
        for (int64_t y = 0; y < height; y++) {
            if (y - down < 0 || y - down >= height || length <= 0) continue;
            memcpy(to + y * width + start, from + (y - down) * width + left_out, length * sizeof *to);
        }
        memset(to, 0, 10 * sizeof *to);
    }
}
