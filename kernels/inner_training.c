/* Trains an MLP whose activation is a piecewise cubic curve, and differentiates its late losses.

   The network has INPUTS inputs, HIDDEN units and CLASSES outputs; its optimizer keeps a mean of squared
   gradients (RMSprop). Parameters are one vector: hidden weight, hidden bias, out weight, out bias. A batch of
   EXAMPLES examples fills ROW vectors of 8 floats; what is beyond its end is zero and has no label.
   In a cell of the curve, with u from 0 to 1,
       value = c0 + c1 u + c2 u^2 + c3 u^3,    slope = (c1 + 2 c2 u + 3 c3 u^2) * cells_per_unit.
   The polynomials of the first and the last cell go on beyond the ends of the curve.
   studies/learned_activation.py has the same in PyTorch, where autograd does the second half of this file.
*/
#include <math.h>
#include <stdint.h>
#include <string.h>

#define ROW ((EXAMPLES + 7) / 8)
#define LENGTH (8 * ROW)
#define OUT (HIDDEN * INPUTS + HIDDEN) /* where the out weights begin */
#define PARAMETERS (OUT + CLASSES * HIDDEN + CLASSES)

typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef float four __attribute__((vector_size(16), aligned(4)));
typedef vec row[ROW];

typedef struct {
    const four *coefficients; /* (cells) */
    int64_t cells;
    float low, cells_per_unit;
} curve;

static inline int32_t find_cell(const curve *f, float a, float *u) {
    float t = (a - f->low) * f->cells_per_unit, last = (float)(f->cells - 1);
    int32_t cell = (int32_t)(t > 0 ? t < last ? t : last : 0); /* 0 for NaN, too; u stays NaN */
    *u = t - (float)cell;
    return cell;
}

static inline void evaluate(const curve *f, int64_t n, const float *points, float *values, float *slopes) {
    for (int64_t k = 0; k < n; k++) {
        float u;
        four c = f->coefficients[find_cell(f, points[k], &u)];
        values[k] = c[0] + u * (c[1] + u * (c[2] + u * c[3]));
        slopes[k] = (c[1] + u * (2 * c[2] + 3 * u * c[3])) * f->cells_per_unit;
    }
}

/* Values and slopes of a curve for each replica: coefficients (replicas, cells, 4), all others (replicas, n) */
int interpolate(int64_t replicas, int64_t n, int64_t cells, float low, float cells_per_unit,
                const float *coefficients, const float *points, float *values, float *slopes) {
    for (int64_t r = 0; r < replicas; r++) {
        curve f = {(const four *)coefficients + r * cells, cells, low, cells_per_unit};
        evaluate(&f, n, points + r * n, values + r * n, slopes + r * n);
    }
    return 0;
}

static inline float sum(const row a) {
    vec s = a[0];
    for (int v = 1; v < ROW; v++) s += a[v];
    float total = 0;
    for (int lane = 0; lane < 8; lane++) total += s[lane];
    return total;
}

/* out (rows) = bias, or what out holds where there is none, + w (rows, inner) x (inner); w by its two steps */
static inline void multiply(int rows, int inner, const float *w, int down, int across, const row *x,
                            const float *bias, row *out) {
    for (int i = 0; i < rows; i++) {
        row s;
        _Pragma("GCC unroll 16") for (int v = 0; v < ROW; v++) s[v] = bias ? (vec){0} + bias[i] : out[i][v];
        for (int k = 0; k < inner; k++) {
            float factor = w[i * down + k * across];
            _Pragma("GCC unroll 16") for (int v = 0; v < ROW; v++) s[v] += factor * x[k][v];
        }
        _Pragma("GCC unroll 16") for (int v = 0; v < ROW; v++) out[i][v] = s[v];
    }
}

/* out (rows, columns) += a (rows) times the transpose of b (columns) */
static inline void multiply_transposed(int rows, int columns, const row *a, const row *b, float *out) {
    for (int i = 0; i < rows; i++) {
        row r;
        memcpy(r, a[i], sizeof r);
        for (int k = 0; k < columns; k++) {
            vec s = {0}, t = {0};
            _Pragma("GCC unroll 16") for (int v = 0; v + 1 < ROW; v += 2) {
                s += r[v] * b[k][v];
                t += r[v + 1] * b[k][v + 1];
            }
            if (ROW % 2) s += r[ROW - 1] * b[k][ROW - 1];
            s += t;
            out[i * columns + k] += ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
        }
    }
}

typedef struct {
    row a[HIDDEN], h[HIDDEN], slope[HIDDEN], p[CLASSES], of_z[CLASSES], of_h[HIDDEN];
} activities;

/* The forward pass, and the gradient of the mean loss at z, of_z, and at h, of_h. Returns the loss. */
static float run(const float *p, const curve *f, const row *x, const int32_t *labels, const float *shift,
                 activities *at) {
    multiply(HIDDEN, INPUTS, p, INPUTS, 1, x, p + HIDDEN * INPUTS, at->a);
    evaluate(f, HIDDEN * LENGTH, (const float *)at->a, (float *)at->h, (float *)at->slope);
    for (int i = 0; i < HIDDEN; i++)
        for (int v = 0; v < ROW; v++) at->h[i][v] += shift[i];
    multiply(CLASSES, HIDDEN, p + OUT, HIDDEN, 1, at->h, p + OUT + CLASSES * HIDDEN, at->p);
    float loss = 0, (*z)[LENGTH] = (void *)at->p, (*of_z)[LENGTH] = (void *)at->of_z;
    for (int k = 0; k < LENGTH; k++) {
        float highest = z[0][k], total = 0;
        for (int c = 1; c < CLASSES; c++) highest = z[c][k] > highest ? z[c][k] : highest;
        float of_label = labels[k] < 0 ? 0 : z[labels[k]][k];
        for (int c = 0; c < CLASSES; c++) total += z[c][k] = expf(z[c][k] - highest);
        for (int c = 0; c < CLASSES; c++) {
            z[c][k] /= total;
            of_z[c][k] = labels[k] < 0 ? 0 : (z[c][k] - (c == labels[k])) / EXAMPLES;
        }
        if (labels[k] >= 0) loss += logf(total) + highest - of_label;
    }
    memset(at->of_h, 0, sizeof at->of_h);
    multiply(HIDDEN, CLASSES, p + OUT, 1, HIDDEN, at->of_z, 0, at->of_h);
    return loss / EXAMPLES;
}

/* For each of `steps` steps the loss; the last parameters; the gradient of the mean of the last `late` losses
   with respect to the coefficients, and to a constant that is added to the activation in each step.
   signals (batches, INPUTS, LENGTH), labels (batches, LENGTH), shifts (steps, HIDDEN); `tape` has room for
   3 PARAMETERS floats of each step; of_coefficients are added to. */
int train_and_differentiate(int64_t steps, int64_t late, int64_t batches, int64_t cells, float low,
                            float cells_per_unit, float lr, float keep, float epsilon,
                            const float *coefficients, const float *signals, const int32_t *labels,
                            const float *shifts, const float *initial, float *tape, float *losses,
                            float *last, float *of_coefficients, float *of_constants) {
    curve f = {(const four *)coefficients, cells, low, cells_per_unit};
    static _Thread_local activities at;
    float *p = last, squares[PARAMETERS];
    memcpy(p, initial, sizeof squares);
    for (int i = 0; i < PARAMETERS; i++) squares[i] = 1;
    for (int64_t step = 0; step < steps; step++) {
        const row *x = (const row *)(signals + step % batches * INPUTS * LENGTH);
        float *before = tape + 3 * step * PARAMETERS, *g = before + PARAMETERS, *after = g + PARAMETERS;
        memcpy(before, p, sizeof squares);
        memset(g, 0, sizeof squares);
        losses[step] = run(p, &f, x, labels + step % batches * LENGTH, shifts + step * HIDDEN, &at);
        multiply_transposed(CLASSES, HIDDEN, at.of_z, at.h, g + OUT);
        for (int c = 0; c < CLASSES; c++) g[OUT + CLASSES * HIDDEN + c] = sum(at.of_z[c]);
        for (int i = 0; i < HIDDEN; i++) {
            for (int v = 0; v < ROW; v++) at.of_h[i][v] *= at.slope[i][v];
            g[HIDDEN * INPUTS + i] = sum(at.of_h[i]);
        }
        multiply_transposed(HIDDEN, INPUTS, at.of_h, x, g);
        for (int i = 0; i < PARAMETERS; i++) {
            squares[i] = keep * squares[i] + (1 - keep) * g[i] * g[i];
            after[i] = squares[i];
            p[i] -= lr * g[i] / (sqrtf(squares[i]) + epsilon);
        }
    }

    /* backwards: of_x is the gradient of the outer loss with respect to x, of_g that to a gradient g */
    float of_p[PARAMETERS] = {0}, of_squares[PARAMETERS] = {0}, of_g[PARAMETERS];
    static _Thread_local row of_ga[HIDDEN], of_h[HIDDEN], of_gz[CLASSES];
    for (int64_t step = steps - 1; step >= 0; step--) {
        const row *x = (const row *)(signals + step % batches * INPUTS * LENGTH);
        const int32_t *y = labels + step % batches * LENGTH;
        const float *before = tape + 3 * step * PARAMETERS, *g = before + PARAMETERS, *after = g + PARAMETERS;
        const float *w = before + OUT, weight = step >= steps - late ? 1.0f / late : 0;
        for (int i = 0; i < PARAMETERS; i++) {
            float root = sqrtf(after[i]), q = root + epsilon;
            of_squares[i] += lr * of_p[i] * g[i] / (2 * root * q * q);
            of_g[i] = -lr * of_p[i] / q + 2 * (1 - keep) * of_squares[i] * g[i];
            of_squares[i] *= keep;
        }
        run(before, &f, x, y, shifts + step * HIDDEN, &at);
        /* g is of_a x^T, the sum of of_a, of_z h^T and the sum of of_z, with of_a = of_h * slope */
        multiply(HIDDEN, INPUTS, of_g, INPUTS, 1, x, of_g + HIDDEN * INPUTS, of_ga);
        multiply(CLASSES, HIDDEN, of_g + OUT, HIDDEN, 1, at.h, of_g + OUT + CLASSES * HIDDEN, of_gz);
        memset(of_h, 0, sizeof of_h);
        multiply(HIDDEN, CLASSES, of_g + OUT, 1, HIDDEN, at.of_z, 0, of_h);
        for (int i = 0; i < HIDDEN; i++)
            for (int v = 0; v < ROW; v++) {
                vec of_slope = of_ga[i][v] * at.of_h[i][v];
                of_ga[i][v] *= at.slope[i][v]; /* from here on with respect to the of_h of the inner pass */
                at.of_h[i][v] = of_slope;      /* in the place of what is no longer needed */
            }
        multiply(CLASSES, HIDDEN, w, HIDDEN, 1, of_ga, 0, of_gz);
        multiply_transposed(CLASSES, HIDDEN, at.of_z, of_ga, of_p + OUT);
        for (int k = 0; k < LENGTH; k++) { /* through the softmax */
            float mean = 0, (*chance)[LENGTH] = (void *)at.p, (*of_z)[LENGTH] = (void *)at.of_z;
            float(*of)[LENGTH] = (void *)of_gz;
            for (int c = 0; c < CLASSES; c++) mean += chance[c][k] * of[c][k];
            for (int c = 0; c < CLASSES; c++)
                of[c][k] = y[k] < 0 ? 0 : chance[c][k] * (of[c][k] - mean) / EXAMPLES + weight * of_z[c][k];
        }
        multiply_transposed(CLASSES, HIDDEN, of_gz, at.h, of_p + OUT);
        for (int c = 0; c < CLASSES; c++) of_p[OUT + CLASSES * HIDDEN + c] += sum(of_gz[c]);
        multiply(HIDDEN, CLASSES, w, 1, HIDDEN, of_gz, 0, of_h);
        of_constants[step] = 0;
        for (int i = 0; i < HIDDEN; i++) {
            float *a = (float *)at.a[i], *slope = (float *)at.slope[i];
            float *of_value = (float *)of_h[i], *of_slope = (float *)at.of_h[i];
            of_constants[step] += sum(of_h[i]);
            for (int k = 0; k < LENGTH; k++) {
                float u, v = of_value[k], s = of_slope[k] * cells_per_unit;
                int32_t cell = find_cell(&f, a[k], &u);
                four c = f.coefficients[cell];
                four powers = {1, u, u * u, u * u * u}, derivatives = {0, 1, 2 * u, 3 * u * u};
                ((four *)of_coefficients)[cell] += v * powers + s * derivatives;
                a[k] = v * slope[k] + s * (2 * c[2] + 6 * u * c[3]) * cells_per_unit; /* now of a */
            }
            of_p[HIDDEN * INPUTS + i] += sum(at.a[i]);
        }
        multiply_transposed(HIDDEN, INPUTS, at.a, x, of_p);
    }
    return 0;
}
