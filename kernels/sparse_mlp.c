// Trains a residual MLP most of whose weights may have been removed, by touching those that are left alone.
//
// studies/lottery_tickets.py defines what is right, in PyTorch:
//     h1 = relu(W1 x), h2 = h1 + relu(W2 h1), logits = W3 h2,
// where a bias is the last column of its matrix and is multiplied by 1. Activations are feature-major, a tile
// of 104 examples at a time: a feature is a row of 104 floats, so that a weight is one broadcast and 13
// multiplications of vectors, and a sum over weights stays in 13 registers of 8 floats. A tile that is not
// full holds zeros, with the label -1. The row after the last feature holds ones.
//
// Nothing is kept from call to call but what the caller owns, so threads may call at once.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define VECTORS 13
#define TILE (LANES * VECTORS)
#define LAYERS 3
#define CLASSES 10
#define INLINE static inline __attribute__((always_inline))
#define EACH_VECTOR _Pragma("GCC unroll 13") for (int i = 0; i < VECTORS; i++)

// Without this, gcc for x86 reads a vector from memory for each of its two uses.
#ifdef __x86_64__
#define LOAD_ONCE(vector) __asm__("" : "+x"(vector))
#else
#define LOAD_ONCE(vector)
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float half_vec __attribute__((vector_size(2 * LANES)));
typedef vec row[VECTORS];  // a feature of all examples of a tile

// A matrix (rows, columns + 1), the weights that are left in it only. `weight` and what Adam keeps are ordered
// by blocks of columns, in these by rows. The same weights ordered by blocks of rows, in these by columns, are
// at `place`. Blocks are for matrices of many weights: what a block reads stays in the nearest cache.
typedef struct {
    int64_t rows, columns, count, column_blocks, row_blocks;
    const int32_t *row_start;     // (column_blocks * rows + 1): the first weight of each block's row
    const int32_t *column;        // (count)
    const int32_t *column_start;  // (row_blocks * (columns + 1) + 1)
    const int32_t *row;           // (count), in the other order, and so is
    const int32_t *place;         // (count)
    float *weight, *gradient, *mean, *square;
} layer;

INLINE float sum(vec x) {
    half_vec half[2];
    memcpy(half, &x, sizeof x);
    half_vec four = half[0] + half[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// x where it is positive, else 0. NaN stays NaN.
INLINE vec relu(vec x) { return (vec)((ivec)x & ~(x < 0)); }

// y = W x: x (columns + 1), y (rows)
static void multiply(const layer *w, const row *restrict x, row *restrict y) {
    memset(y, 0, w->rows * sizeof(row));
    const int32_t *start = w->row_start;
    for (int64_t block = 0; block < w->column_blocks; block++)
        for (int64_t r = 0; r < w->rows; r++, start++) {
            row total;
            EACH_VECTOR total[i] = y[r][i];
            for (int32_t k = start[0]; k < start[1]; k++) {
                const vec *from = x[w->column[k]];
                float weight = w->weight[k];
                EACH_VECTOR total[i] += weight * from[i];
            }
            EACH_VECTOR y[r][i] = total[i];
        }
}

// Its backward: the gradient of W grows by dy x', and dx (columns + 1) by W' dy.
static void multiply_backward(const layer *w, const row *restrict x, const row *restrict dy, row *restrict dx) {
    const int32_t *start = w->column_start;
    for (int64_t block = 0; block < w->row_blocks; block++)
        for (int64_t c = 0; c <= w->columns; c++, start++) {
            row total;
            EACH_VECTOR total[i] = dx[c][i];
            for (int32_t k = start[0]; k < start[1]; k++) {
                const vec *from = dy[w->row[k]];
                int32_t place = w->place[k];
                float weight = w->weight[place];
                vec dot = {0};
                EACH_VECTOR {
                    vec d = from[i];
                    LOAD_ONCE(d);
                    total[i] += weight * d;
                    dot += d * x[c][i];
                }
                w->gradient[place] += sum(dot);
            }
            EACH_VECTOR dx[c][i] = total[i];
        }
}

// The same without dx, which the first layer does not need.
static void weights_backward(const layer *w, const row *restrict x, const row *restrict dy) {
    const int32_t *start = w->row_start;
    for (int64_t block = 0; block < w->column_blocks; block++)
        for (int64_t r = 0; r < w->rows; r++, start++)
            for (int32_t k = start[0]; k < start[1]; k++) {
                const vec *from = x[w->column[k]];
                vec dot = {0};
                EACH_VECTOR dot += dy[r][i] * from[i];
                w->gradient[k] += sum(dot);
            }
}

// Rows in the workspace of the caller, whose hidden layers have `hidden` units each
typedef struct {
    row *h1, *h2;   // (hidden + 1), the last of ones
    row *z1, *z2;   // (hidden) before the ReLU
    row *d1, *d2;   // (hidden + 1) gradients
    row *logits;    // (CLASSES), then their gradients
} activities;

static activities lay_out(row *workspace, int64_t hidden) {
    activities a;
    a.h1 = workspace;
    a.h2 = a.h1 + hidden + 1;
    a.z1 = a.h2 + hidden + 1;
    a.z2 = a.z1 + hidden;
    a.d1 = a.z2 + hidden;
    a.d2 = a.d1 + hidden + 1;
    a.logits = a.d2 + hidden + 1;
    EACH_VECTOR a.h1[hidden][i] = a.h2[hidden][i] = 1 - (vec){0};
    return a;
}

static void forward(const layer *w, const row *x, const activities *a) {
    int64_t hidden = w[0].rows;
    multiply(&w[0], x, a->z1);
    for (int64_t r = 0; r < hidden; r++) EACH_VECTOR a->h1[r][i] = relu(a->z1[r][i]);
    multiply(&w[1], a->h1, a->z2);
    for (int64_t r = 0; r < hidden; r++) EACH_VECTOR a->h2[r][i] = a->h1[r][i] + relu(a->z2[r][i]);
    multiply(&w[2], a->h2, a->logits);
}

// From the gradients of the logits
static void backward(const layer *w, const row *x, const activities *a) {
    int64_t hidden = w[0].rows;
    memset(a->d1, 0, hidden * sizeof(row));
    multiply_backward(&w[2], a->h2, a->logits, a->d1);  // that of h2, which is the first part of that of h1
    for (int64_t r = 0; r < hidden; r++)
        EACH_VECTOR a->d2[r][i] = (vec)((ivec)a->d1[r][i] & (a->z2[r][i] > 0));
    multiply_backward(&w[1], a->h1, a->d2, a->d1);
    for (int64_t r = 0; r < hidden; r++)
        EACH_VECTOR a->d1[r][i] = (vec)((ivec)a->d1[r][i] & (a->z1[r][i] > 0));
    weights_backward(&w[0], x, a->d1);
}

// The cross-entropy of a tile, summed over its examples, and how many of them are missed. With `scale`, the
// logits become the gradient of the loss times `scale`.
static double cross_entropy(row *logits, const int32_t *label, float scale, int64_t *misses) {
    float(*z)[TILE] = (float(*)[TILE])logits;
    double loss = 0;
    for (int e = 0; e < TILE; e++) {
        int best = 0;
        for (int c = 1; c < CLASSES; c++)
            if (z[c][e] > z[best][e]) best = c;
        float highest = z[best][e], power[CLASSES], total = 0;
        for (int c = 0; c < CLASSES; c++) total += power[c] = expf(z[c][e] - highest);
        if (label[e] >= 0) {
            loss += logf(total) + highest - z[label[e]][e];
            *misses += best != label[e];
        }
        if (scale == 0) continue;
        for (int c = 0; c < CLASSES; c++)
            z[c][e] = label[e] < 0 ? 0 : scale * (power[c] / total - (c == label[e]));
    }
    return loss;
}

// Adam with PyTorch's defaults, and its order of operations
static void adam(const layer *w, float lr, int64_t step) {
    float *restrict weight = w->weight, *restrict gradient = w->gradient;
    float *restrict mean = w->mean, *restrict square = w->square;
    const float rate = (float)(lr / (1 - pow(0.9, (double)step)));
    const float root = (float)sqrt(1 - pow(0.999, (double)step));
    for (int64_t k = 0; k < w->count; k++) {
        float g = gradient[k];
        mean[k] += 0.1f * (g - mean[k]);
        square[k] = 0.999f * square[k] + 0.001f * (g * g);
        weight[k] -= rate * mean[k] / (sqrtf(square[k]) / root + 1e-8f);
        gradient[k] = 0;
    }
}

int64_t tile_size(void) { return TILE; }

// Updates first .. first + steps - 1, of which each takes the next of `batches` batches, in turn. A batch is
// `tiles` tiles of x (columns + 1 rows) and labels (TILE), and `size` examples. Returns 1, at once, if a loss
// is not finite.
int64_t train(const layer *w, const row *x, const int32_t *labels, int64_t batches, int64_t tiles, int64_t size,
              int64_t first, int64_t steps, double lr, row *workspace) {
    activities a = lay_out(workspace, w[0].rows);
    for (int64_t step = first; step < first + steps; step++) {
        double loss = 0;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t tile = step % batches * tiles + t, misses = 0;
            const row *own = x + tile * (w[0].columns + 1);
            forward(w, own, &a);
            loss += cross_entropy(a.logits, labels + tile * TILE, 1 / (float)size, &misses);
            backward(w, own, &a);
        }
        if (!isfinite(loss)) return 1;
        for (int l = 0; l < LAYERS; l++) adam(&w[l], lr, step + 1);
    }
    return 0;
}

// The loss of all tiles, summed over examples, and how many of them are missed
double evaluate(const layer *w, const row *x, const int32_t *labels, int64_t tiles, int64_t *misses,
                row *workspace) {
    activities a = lay_out(workspace, w[0].rows);
    double loss = 0;
    *misses = 0;
    for (int64_t t = 0; t < tiles; t++) {
        forward(w, x + t * (w[0].columns + 1), &a);
        loss += cross_entropy(a.logits, labels + t * TILE, 0, misses);
    }
    return loss;
}
