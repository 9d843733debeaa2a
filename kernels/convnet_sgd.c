// Trains a small convnet by SGD with momentum, and tells of each example whether it was right when presented.
//
// studies/myth4_forgetting.py defines what is right, in PyTorch:
//     conv 5x5, max pool 2x2, ReLU, conv 5x5, max pool 2x2, ReLU, linear, ReLU, linear, cross-entropy.
// Its sizes come by -D: SIDE and INPUTS of the images (INPUTS, SIDE, SIDE), MAPS1 and MAPS2 of the convolutions,
// and HIDDEN units. Examples lie side by side, in the lanes of vectors: a tile is LANES examples, an activity of
// all of them is one vector, and each weight is a broadcast. A batch is several tiles, of which the last may have
// lanes that are empty: their images are zeros, and so are the gradients of their logits.
//
// A convolution and its pooling are one step: the four sums that are pooled stay in registers. Kept are the
// largest, after its ReLU, and which one it was, or NONE where the ReLU lets no gradient through. Nothing is kept
// from call to call but what the caller owns, so threads may call at once.

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define GROUP 5  // maps at a time, whose sums fit the registers
#else
#define LANES 8
#define GROUP 2
#endif
#define K 5
#define CLASSES 10
#define NONE 4
#define POOLED(side) (((side) - K + 1) / 2)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

enum { SIDE1 = POOLED(SIDE), SIDE2 = POOLED(SIDE1), AREA = SIDE * SIDE, AREA1 = SIDE1 * SIDE1, AREA2 = SIDE2 * SIDE2 };
enum { FLAT = MAPS2 * AREA2 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float half_vec __attribute__((vector_size(2 * LANES)));

// Parameters, in PyTorch's layout and order; also their gradients and velocities
struct network {
    float conv1w[MAPS1 * INPUTS * K * K], conv1b[MAPS1];
    float conv2w[MAPS2 * MAPS1 * K * K], conv2b[MAPS2];
    float hiddenw[HIDDEN * FLAT], hiddenb[HIDDEN];
    float outw[CLASSES * HIDDEN], outb[CLASSES];
};

struct workspace {
    vec image[INPUTS * AREA], h1[MAPS1 * AREA1], h2[FLAT], h3[HIDDEN], out[CLASSES];
    vec d1[MAPS1 * AREA1], d2[FLAT], d3[HIDDEN];  // gradients of h1, h2 and h3; that of out takes its place
    ivec winner1[MAPS1 * AREA1], winner2[FLAT];
    struct network gradient;
};

INLINE vec choose(ivec condition, vec a, vec b) { return (vec)((condition & (ivec)a) | (~condition & (ivec)b)); }
INLINE vec relu(vec x) { return (vec)((ivec)x & ~(x < 0)); }  // NaN stays NaN

INLINE float sum(vec x) {
    half_vec half[2];
    memcpy(half, &x, sizeof x);
    half_vec s = half[0] + half[1];
    float total = 0;
    UNROLL for (int i = 0; i < LANES / 4; i++) total += s[i] + s[i + LANES / 4];
    return total;
}

// The layers: x (inputs, side, side) and y (maps, side of y, side of y); w (maps, inputs, K, K), b (maps)

INLINE void conv(const float *w, const float *b, const vec *x, int inputs, int side, int maps, vec *y, ivec *winner) {
    const int pooled = POOLED(side);
    for (int m = 0; m < maps; m += GROUP)
        for (int p = 0; p < pooled * pooled; p++) {
            vec s[GROUP][4];
            UNROLL for (int g = 0; g < GROUP; g++)
                UNROLL for (int k = 0; k < 4; k++) s[g][k] = b[m + g] - (vec){0};
            for (int c = 0; c < inputs; c++)
                for (int ky = 0; ky < K; ky++) {
                    const vec *from = x + (c * side + p / pooled * 2 + ky) * side + p % pooled * 2;
                    UNROLL for (int kx = 0; kx < K; kx++)
                        UNROLL for (int g = 0; g < GROUP; g++) {
                            const float weight = w[((m + g) * inputs + c) * K * K + ky * K + kx];
                            UNROLL for (int k = 0; k < 4; k++) s[g][k] += weight * from[k / 2 * side + k % 2 + kx];
                        }
                }
            UNROLL for (int g = 0; g < GROUP; g++) {
                vec best = s[g][0];
                ivec which = {0};
                UNROLL for (int k = 1; k < 4; k++) {
                    const ivec more = s[g][k] > best;
                    best = choose(more, s[g][k], best);
                    which = (more & k) | (~more & which);
                }
                y[(m + g) * pooled * pooled + p] = relu(best);
                winner[(m + g) * pooled * pooled + p] = (best > 0 & which) | (~(best > 0) & NONE);
            }
        }
}

// The gradient of the sum k of those that were pooled into one
INLINE vec unpool(vec dy, ivec winner, int k) { return (vec)((ivec)dy & (winner == k)); }

INLINE void conv_weights_backward(const vec *x, int inputs, int side, int maps, const vec *dy, const ivec *winner,
                                  float *dw, float *db) {
    const int pooled = POOLED(side), area = pooled * pooled;
    for (int m = 0; m < maps; m += GROUP)
        for (int c = 0; c < inputs; c++)
            for (int ky = 0; ky < K; ky++) {
                vec s[GROUP][K] = {0};
                for (int p = 0; p < area; p++)
                    UNROLL for (int k = 0; k < 4; k++) {
                        const vec *from = x + (c * side + p / pooled * 2 + k / 2 + ky) * side + p % pooled * 2 + k % 2;
                        UNROLL for (int g = 0; g < GROUP; g++) {
                            const vec d = unpool(dy[(m + g) * area + p], winner[(m + g) * area + p], k);
                            UNROLL for (int kx = 0; kx < K; kx++) s[g][kx] += d * from[kx];
                        }
                    }
                for (int g = 0; g < GROUP; g++)
                    for (int kx = 0; kx < K; kx++) dw[((m + g) * inputs + c) * K * K + ky * K + kx] += sum(s[g][kx]);
            }
    for (int m = 0; m < maps; m++) {
        vec s = {0};
        for (int p = m * area; p < (m + 1) * area; p++) s += (vec)((ivec)dy[p] & (winner[p] != NONE));
        db[m] += sum(s);
    }
}

// A row of dx at a time, in registers
INLINE void conv_inputs_backward(const float *w, int inputs, int side, int maps, const vec *dy, const ivec *winner,
                                 vec *dx) {
    const int pooled = POOLED(side), area = pooled * pooled;
    for (int c = 0; c < inputs; c++)
        for (int y = 0; y < side; y++) {
            vec s[2 * POOLED(SIDE1) + K - 1] = {0};
            for (int ky = 0; ky < K; ky++) {
                const int from = y - ky;  // the row of the sums before pooling
                if (from < 0 || from >= 2 * pooled) continue;
                for (int m = 0; m < maps; m++) {
                    const int p = m * area + from / 2 * pooled;
                    const float *weight = w + (m * inputs + c) * K * K + ky * K;
                    UNROLL for (int i = 0; i < 2 * POOLED(SIDE1); i++) {
                        const vec d = unpool(dy[p + i / 2], winner[p + i / 2], from % 2 * 2 + i % 2);
                        UNROLL for (int kx = 0; kx < K; kx++) s[i + kx] += weight[kx] * d;
                    }
                }
            }
            UNROLL for (int i = 0; i < side; i++) dx[(c * side + y) * side + i] = s[i];
        }
}

INLINE void linear(const float *w, const float *b, const vec *x, int inputs, int outputs, vec *y) {
    for (int o = 0; o < outputs; o += 5) {
        vec s[5];
        UNROLL for (int g = 0; g < 5; g++) s[g] = b[o + g] - (vec){0};
        for (int i = 0; i < inputs; i++) UNROLL for (int g = 0; g < 5; g++) s[g] += w[(o + g) * inputs + i] * x[i];
        UNROLL for (int g = 0; g < 5; g++) y[o + g] = s[g];
    }
}

INLINE void linear_backward(const float *w, const vec *x, int inputs, int outputs, const vec *dy, vec *dx, float *dw,
                            float *db) {
    for (int i = 0; i < inputs; i++) dx[i] = (vec){0};
    for (int o = 0; o < outputs; o++) {
        for (int i = 0; i < inputs; i++) {
            dx[i] += w[o * inputs + i] * dy[o];
            dw[o * inputs + i] += sum(dy[o] * x[i]);
        }
        db[o] += sum(dy[o]);
    }
}

static void forward(const struct network *net, struct workspace *a) {
    conv(net->conv1w, net->conv1b, a->image, INPUTS, SIDE, MAPS1, a->h1, a->winner1);
    conv(net->conv2w, net->conv2b, a->h1, MAPS1, SIDE1, MAPS2, a->h2, a->winner2);
    linear(net->hiddenw, net->hiddenb, a->h2, FLAT, HIDDEN, a->h3);
    for (int i = 0; i < HIDDEN; i++) a->h3[i] = relu(a->h3[i]);
    linear(net->outw, net->outb, a->h3, HIDDEN, CLASSES, a->out);
}

// From the gradient of the logits, in a->out
static void backward(const struct network *net, struct workspace *a) {
    struct network *gradient = &a->gradient;
    linear_backward(net->outw, a->h3, HIDDEN, CLASSES, a->out, a->d3, gradient->outw, gradient->outb);
    for (int i = 0; i < HIDDEN; i++) a->d3[i] = (vec)((ivec)a->d3[i] & (a->h3[i] > 0));
    linear_backward(net->hiddenw, a->h2, FLAT, HIDDEN, a->d3, a->d2, gradient->hiddenw, gradient->hiddenb);
    conv_weights_backward(a->h1, MAPS1, SIDE1, MAPS2, a->d2, a->winner2, gradient->conv2w, gradient->conv2b);
    conv_inputs_backward(net->conv2w, MAPS1, SIDE1, MAPS2, a->d2, a->winner2, a->d1);
    conv_weights_backward(a->image, INPUTS, SIDE, MAPS1, a->d1, a->winner1, gradient->conv1w, gradient->conv1b);
}

// Lay out the images (n, INPUTS, SIDE, SIDE) at `index` as a tile; of `count` examples, there may be none.
static void load(const float *images, const int64_t *index, int count, vec *tile) {
    for (int e = 0; e < LANES; e++) {
        const float *image = e < count ? images + index[e] * INPUTS * AREA : 0;
        for (int i = 0; i < INPUTS * AREA; i++) tile[i][e] = image ? image[i] : 0;
    }
}

// The cross-entropy of a tile, summed; whether each answer is right; in place of logits, `scale` times their gradient
static double cross_entropy(vec *logits, const int64_t *labels, const int64_t *index, int count, float scale,
                            uint8_t *right) {
    double loss = 0;
    for (int e = 0; e < LANES; e++) {
        float power[CLASSES], total = 0;
        int best = 0;
        for (int c = 1; c < CLASSES; c++)
            if (logits[c][e] > logits[best][e]) best = c;
        const float highest = logits[best][e];
        for (int c = 0; c < CLASSES; c++) total += power[c] = expf(logits[c][e] - highest);
        const int label = e < count ? labels[index[e]] : -1;
        if (label >= 0) {
            loss += logf(total) + highest - logits[label][e];
            right[e] = best == label;
        }
        for (int c = 0; c < CLASSES; c++) logits[c][e] = label < 0 ? 0 : scale * (power[c] / total - (c == label));
    }
    return loss;
}

int64_t workspace_size(void) { return sizeof(struct workspace); }
int64_t parameter_count(void) { return sizeof(struct network) / sizeof(float); }

// Present the n examples `order`, and step after each `batch` of them and after what is left. right[i] tells
// whether example order[i] was answered right before that step. With batch = 0, only look. Returns the summed loss.
double present(struct network *restrict net, struct network *restrict velocity, const float *images,
               const int64_t *labels, const int64_t *order, int64_t n, int64_t batch, float lr, float momentum,
               uint8_t *right, struct workspace *restrict a) {
    double loss = 0;
    float *w = (float *)net, *v = (float *)velocity, *gradient = (float *)&a->gradient;
    for (int64_t first = 0, size; first < n; first += size) {
        size = batch && batch < n - first ? batch : n - first;
        memset(gradient, 0, sizeof a->gradient);
        for (int64_t i = first; i < first + size; i += LANES) {
            const int count = first + size - i < LANES ? first + size - i : LANES;
            load(images, order + i, count, a->image);
            forward(net, a);
            loss += cross_entropy(a->out, labels, order + i, count, 1 / (float)size, right + i);
            if (batch) backward(net, a);
        }
        for (int64_t k = 0; batch && k < parameter_count(); k++) {
            v[k] = momentum * v[k] + gradient[k];
            w[k] -= lr * v[k];
        }
    }
    return loss;
}
