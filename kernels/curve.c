/* Piecewise cubic curves, each evaluated at many points: values, slopes, and what flows back from both.

   A replica has a curve of its own: `cells` cells of equal width, which begin at `low`, and four
   coefficients in each, so that with u from 0 to 1 in a cell,
       value = c0 + c1 u + c2 u^2 + c3 u^3,    slope = (c1 + 2 c2 u + 3 c3 u^2) * cells_per_unit.
   Beyond its ends, the polynomials of the first and the last cell go on. studies/metalearn_activation.py has the same in
   PyTorch, and the tests hold this against it.
   Arrays: coefficients (replicas, cells, 4), all others (replicas, n); float32, contiguous.
*/
#include <stdint.h>

typedef float four __attribute__((vector_size(16), aligned(4)));

static inline int64_t find_cell(float a, float low, float cells_per_unit, int64_t cells, float *u) {
    float t = (a - low) * cells_per_unit;
    float last = (float)(cells - 1);
    int32_t cell = (int32_t)(t > 0 ? t < last ? t : last : 0); /* 0 for NaN, too; u stays NaN */
    *u = t - (float)cell;
    return cell;
}

int curve_forward(int64_t replicas, int64_t n, int64_t cells, float low, float cells_per_unit,
                  const float *restrict coefficients, const float *restrict points,
                  float *restrict values, float *restrict slopes) {
    for (int64_t r = 0; r < replicas; r++)
        for (int64_t k = r * n; k < (r + 1) * n; k++) {
            float u;
            int64_t cell = find_cell(points[k], low, cells_per_unit, cells, &u);
            four c = *(const four *)(coefficients + (r * cells + cell) * 4);
            values[k] = c[0] + u * (c[1] + u * (c[2] + u * c[3]));
            slopes[k] = (c[1] + u * (2 * c[2] + 3 * u * c[3])) * cells_per_unit;
        }
    return 0;
}

/* From the gradients of values and of slopes: that of the points (written) and of the coefficients (added). */
int curve_backward(int64_t replicas, int64_t n, int64_t cells, float low, float cells_per_unit,
                   const float *restrict coefficients, const float *restrict points,
                   const float *restrict of_values, const float *restrict of_slopes,
                   float *restrict of_points, float *restrict of_coefficients) {
    for (int64_t r = 0; r < replicas; r++)
        for (int64_t k = r * n; k < (r + 1) * n; k++) {
            float u, v = of_values[k], s = of_slopes[k] * cells_per_unit;
            int64_t at = (r * cells + find_cell(points[k], low, cells_per_unit, cells, &u)) * 4;
            four c = *(const four *)(coefficients + at);
            of_points[k] = cells_per_unit * (v * (c[1] + u * (2 * c[2] + 3 * u * c[3])) +
                                             s * (2 * c[2] + 6 * u * c[3]));
            four powers = {1, u, u * u, u * u * u}, derivatives = {0, 1, 2 * u, 3 * u * u};
            *(four *)(of_coefficients + at) += v * powers + s * derivatives;
        }
    return 0;
}
