// Many GRUs of MNIST-1D's size (Greydanus 2020) side by side, and their gradients through time.
//
// torch.nn.GRU says what is right, for one input and HIDDEN units; this makes it fast. A group is a network
// with weights of its own and with a batch of sequences of its own. For each unit, with h = 0 before step 0:
//   r = sigmoid(wi_r x + bi_r + wh_r h + bh_r)      z = sigmoid(wi_z x + bi_z + wh_z h + bh_z)
//   n = tanh(wi_n x + bi_n + r (wh_n h + bh_n))     h = (1 - z) n + z h
//
// The layout for SIMD. Sequences lie side by side, so no lane ever looks at another; a block of LANES of them
// goes through all steps. Where the batch ends within a block, the rest is padding: nothing beyond the arrays
// is read or written, and what the padding computes, be it NaN, is cut off before it is added to anything.
//
// Gradients of weights are sums over steps and sequences. Each is kept as COLUMNS partial sums, of the
// sequences whose numbers are equal modulo COLUMNS, which are added last. So every sum is taken in an order
// that does not depend on the vectors' width, and no product could be fused into either of two sums.

#include <stdint.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

// Rows of weights are those of PyTorch: of the reset gates r, the update gates z, the new values n.
enum { HIDDEN = 6, ROWS = 3 * HIDDEN, COLUMNS = 16, CHUNK = 8 };

#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")  // where the arrays inside are to be registers

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const unaligned_vec *)p; }
INLINE void store(float *p, vec v) { *(unaligned_vec *)p = v; }
INLINE vec all(float x) { return x - (vec){0}; }

// Of a block that may end early: what is there, and 0.
INLINE vec load_some(const float *p, int32_t count) {
    if (count == LANES) return load(p);
    float padded[LANES] ALIGNED = {0};
    for (int32_t i = 0; i < count; i++) padded[i] = p[i];
    return load(padded);
}
INLINE void store_some(float *p, vec v, int32_t count) {
    if (count == LANES) {
        store(p, v);
        return;
    }
    float padded[LANES] ALIGNED;
    store(padded, v);
    for (int32_t i = 0; i < count; i++) p[i] = padded[i];
}

// Lane by lane: a where the condition holds, b elsewhere.
INLINE vec choose(ivec condition, vec a, vec b) {
    return (vec)((condition & (ivec)a) | (~condition & (ivec)b));
}

// x P(x^2) / Q(x^2), fitted for the least largest relative error up to 7.9; there tanh is 1 - 2.7e-7. Beyond,
// it is 1, so that a unit that is saturated has no slope, however large its weights. NaN stays NaN.
INLINE vec tanh_of(vec x) {
    vec u = x * x;
    vec p = (((1.54279644e-08f * u + 2.20232394e-05f) * u + 0.00357899169f) * u + 0.134506203f) * u + 1.0f;
    vec q = (((8.59877675e-07f * u + 0.000342364999f) * u + 0.0261922367f) * u + 0.467839483f) * u + 1.0f;
    vec y = x * p / q;
    y = choose(x > 7.9f, all(1), y);
    return choose(x < -7.9f, all(-1), y);
}

// 1 / (1 + e^-x), which keeps its digits where it is next to 0, as 0.5 + 0.5 tanh(x / 2) would not. e^y is
// 2^k e^f with |f| <= ln 2 / 2, a polynomial fitted for the least largest relative error.
INLINE vec sigmoid_of(vec x) {
    vec y = -x;
    y = choose(y > 87.0f, all(87), y);  // NaN stays NaN
    y = choose(y < -87.0f, all(-87), y);
    vec shifted = 1.44269504f * y + 12582912.0f;  // 1.5 * 2^23: rounds, and leaves k in the last bits
    vec k = shifted - 12582912.0f;
    vec f = y - k * 0.693359375f;  // ln 2, in a part that multiplies exactly and the rest
    f = f - k * -2.12194440e-4f;
    vec p = ((0.00138368461f * f + 0.00837481601f) * f + 0.0416682256f) * f + 0.166664202f;
    p = ((p * f + 0.499999921f) * f + 1.00000004f) * f + 1.0f;
    // A product: adding k to the exponent of p could make a number of NaN.
    vec power = (vec)(((ivec)shifted << 23) + 0x3f800000);
    return 1.0f / (p * power + 1.0f);
}

// What a hidden state adds to row j, from its bias on.
INLINE vec recur(const float *wh, int32_t j, const vec *h, vec sum) {
    UNROLL for (int32_t k = 0; k < HIDDEN; k++) sum += wh[HIDDEN * j + k] * h[k];
    return sum;
}

// Forward: x (steps, batch) and states (steps, HIDDEN, batch) from this block on; gates (steps, HIDDEN, 3,
// LANES) of r, z and n, or NULL.
INLINE void forward_block(int64_t steps, int64_t batch, int32_t count, const float *restrict x,
                          const float *restrict wi, const float *restrict wh, const float *restrict bi,
                          const float *restrict bh, float *restrict states, float *restrict gates) {
    vec h[HIDDEN] = {{0}};
    float bias[ROWS];
    for (int32_t j = 0; j < ROWS; j++) bias[j] = j < 2 * HIDDEN ? bi[j] + bh[j] : bi[j];
    for (int64_t t = 0; t < steps; t++) {
        vec input = load_some(x + t * batch, count), next[HIDDEN];
        UNROLL for (int32_t i = 0; i < HIDDEN; i++) {
            const int32_t jr = i, jz = HIDDEN + i, jn = 2 * HIDDEN + i;
            vec r = sigmoid_of(recur(wh, jr, h, wi[jr] * input + bias[jr]));
            vec z = sigmoid_of(recur(wh, jz, h, wi[jz] * input + bias[jz]));
            vec n = tanh_of(r * recur(wh, jn, h, all(bh[jn])) + (wi[jn] * input + bias[jn]));
            next[i] = z * (h[i] - n) + n;
            store_some(states + (t * HIDDEN + i) * batch, next[i], count);
            if (gates) {
                float *kept = gates + (t * HIDDEN + i) * 3 * LANES;
                store(kept, r);
                store(kept + LANES, z);
                store(kept + 2 * LANES, n);
            }
        }
        UNROLL for (int32_t i = 0; i < HIDDEN; i++) h[i] = next[i];
    }
}

// Backward. d is an error: the derivative of the loss by what a gate's sigmoid or tanh is applied to. New
// values have two rows, as their hidden part is multiplied by r: rows r, z, hidden n, and then input n.

// Of some steps of a block: errors, and what they are to be multiplied by.
struct chunk {
    vec d[CHUNK][ROWS + HIDDEN];
    vec h[CHUNK][HIDDEN];  // before the step
    vec x[CHUNK];
};

// Partial sums of a row's error times h, times x, and of the error itself.
struct sums {
    float row[ROWS + HIDDEN][HIDDEN + 2][COLUMNS];
} ALIGNED;

// One step of a block: errors from dh, by this step's states; dh becomes that by the states before.
INLINE void backward_step(const float *wh, const float *bh, const float *gates, const vec *h, ivec valid,
                          vec *dh, vec *d) {
    vec passed[HIDDEN] = {{0}};
    UNROLL for (int32_t i = 0; i < HIDDEN; i++) {
        vec r = load(gates + 3 * LANES * i), z = load(gates + 3 * LANES * i + LANES);
        vec n = load(gates + 3 * LANES * i + 2 * LANES);
        vec dn = dh[i] * (1.0f - z) * (1.0f - n * n);
        vec error[3] = {dn * recur(wh, 2 * HIDDEN + i, h, all(bh[2 * HIDDEN + i])) * (r * (1.0f - r)),
                        dh[i] * (h[i] - n) * (z * (1.0f - z)), dn * r};
        UNROLL for (int32_t gate = 0; gate < 3; gate++) {
            const int32_t j = HIDDEN * gate + i;
            UNROLL for (int32_t k = 0; k < HIDDEN; k++) passed[k] += wh[HIDDEN * j + k] * error[gate];
            d[j] = (vec)((ivec)error[gate] & valid);
        }
        d[ROWS + i] = (vec)((ivec)dn & valid);
        dh[i] *= z;
    }
    UNROLL for (int32_t i = 0; i < HIDDEN; i++) dh[i] += passed[i];
}

// Add a chunk to the sums of rows `from` to `to`, of errors alone, times x, and, where `times_h`, times h.
INLINE void add_rows(const struct chunk *c, int32_t steps, int32_t from, int32_t to, int times_h,
                     struct sums *sums, int32_t column) {
    for (int32_t j = from; j < to; j++) {
        vec sum[HIDDEN + 2];
        UNROLL for (int32_t k = 0; k < HIDDEN + 2; k++) sum[k] = load(&sums->row[j][k][column]);
        for (int32_t s = 0; s < steps; s++) {
            vec d = c->d[s][j];
            if (times_h)
                UNROLL for (int32_t k = 0; k < HIDDEN; k++) sum[k] += d * c->h[s][k];
            sum[HIDDEN] += d * c->x[s];
            sum[HIDDEN + 1] += d;
        }
        UNROLL for (int32_t k = 0; k < HIDDEN + 2; k++) store(&sums->row[j][k][column], sum[k]);
    }
}

// As forward_block; dstates (steps, HIDDEN, batch) is the derivative of the loss by the states.
INLINE void backward_block(int64_t steps, int64_t batch, int32_t count, const float *restrict x,
                           const float *restrict wh, const float *restrict bh, const float *restrict states,
                           const float *restrict gates, const float *restrict dstates, struct sums *sums,
                           int32_t column) {
    struct chunk c;
    vec dh[HIDDEN] = {{0}};
    ivec valid;
    for (int32_t lane = 0; lane < LANES; lane++) valid[lane] = lane < count ? -1 : 0;
    for (int64_t t = steps; t > 0;) {
        int32_t s = 0;
        for (; s < CHUNK && t > 0; s++) {
            t--;
            c.x[s] = load_some(x + t * batch, count);
            UNROLL for (int32_t i = 0; i < HIDDEN; i++) {
                dh[i] += load_some(dstates + (t * HIDDEN + i) * batch, count);
                c.h[s][i] = t > 0 ? load_some(states + ((t - 1) * HIDDEN + i) * batch, count) : all(0);
            }
            backward_step(wh, bh, gates + t * ROWS * LANES, c.h[s], valid, dh, c.d[s]);
        }
        add_rows(&c, s, 0, ROWS, 1, sums, column);
        add_rows(&c, s, ROWS, ROWS + HIDDEN, 0, sums, column);
    }
}

static float add_columns(const float *part) {
    float sum = 0;
    for (int32_t i = 0; i < COLUMNS; i++) sum += part[i];
    return sum;
}

// Exported. For each group: x (steps, batch), states and dstates (steps, HIDDEN, batch), and of the weights
// and their gradients wi (ROWS), wh (ROWS, HIDDEN), bi (ROWS), bh (ROWS). gates are for backward:
// (blocks, steps, HIDDEN, 3, LANES), with a block for each LANES of the batch, or what is left of it.

// How many floats a vector holds.
int32_t lanes(void) { return LANES; }

// The states after each step; gates may be NULL.
void forward(int64_t groups, int64_t steps, int64_t batch, const float *restrict x, const float *restrict wi,
             const float *restrict wh, const float *restrict bi, const float *restrict bh,
             float *restrict states, float *restrict gates) {
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t from = 0; from < batch; from += LANES) {
            const int64_t left = batch - from;
            if (left >= LANES)
                forward_block(steps, batch, LANES, x + from, wi, wh, bi, bh, states + from, gates);
            else
                forward_block(steps, batch, (int32_t)left, x + from, wi, wh, bi, bh, states + from, gates);
            if (gates) gates += steps * ROWS * LANES;
        }
        x += steps * batch, states += steps * HIDDEN * batch;
        wi += ROWS, wh += ROWS * HIDDEN, bi += ROWS, bh += ROWS;
    }
}

// The gradients dwi, dwh, dbi and dbh, from what forward was given and has made. All it needs lies on the
// stack, 40 kB at most.
void backward(int64_t groups, int64_t steps, int64_t batch, const float *restrict x, const float *restrict wh,
              const float *restrict bh, const float *restrict states, const float *restrict gates,
              const float *restrict dstates, float *restrict dwi, float *restrict dwh, float *restrict dbi,
              float *restrict dbh) {
    for (int64_t g = 0; g < groups; g++) {
        struct sums sums = {0};
        for (int64_t from = 0; from < batch; from += LANES) {
            const int64_t left = batch - from;
            const int32_t column = (int32_t)(from % COLUMNS);
            if (left >= LANES)
                backward_block(steps, batch, LANES, x + from, wh, bh, states + from, gates, dstates + from,
                               &sums, column);
            else
                backward_block(steps, batch, (int32_t)left, x + from, wh, bh, states + from, gates,
                               dstates + from, &sums, column);
            gates += steps * ROWS * LANES;
        }
        for (int32_t j = 0; j < ROWS; j++) {
            const int32_t input = j < 2 * HIDDEN ? j : j + HIDDEN;  // the row of what multiplies x
            for (int32_t k = 0; k < HIDDEN; k++) dwh[HIDDEN * j + k] = add_columns(sums.row[j][k]);
            dwi[j] = add_columns(sums.row[input][HIDDEN]);
            dbi[j] = add_columns(sums.row[input][HIDDEN + 1]);
            dbh[j] = add_columns(sums.row[j][HIDDEN + 1]);
        }
        x += steps * batch, states += steps * HIDDEN * batch, dstates += steps * HIDDEN * batch;
        wh += ROWS * HIDDEN, bh += ROWS;
        dwi += ROWS, dwh += ROWS * HIDDEN, dbi += ROWS, dbh += ROWS;
    }
}
