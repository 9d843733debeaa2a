// Products of maps with local receptive fields without weight sharing: forward, by weights, and by inputs.
//
// local_fields.py defines what is right, in PyTorch (TorchFields), and says what a tile is. A map has SIDE x SIDE
// places of MAPS numbers; padded, it has a border of zeros that is half of a field wide. A tile of 4x4 places
// sees PATCH x PATCH of the padded places, and has a matrix (14*14*3 inputs, 4*4*3 units) of weights.
//
// A cell is 32 bits: two bfloat16 with -DBF16=1, otherwise one float. An instruction multiplies LANES cells by as many
// and adds them up, a cell's two numbers together. Units are in the lanes, and each input is multiplied by those in
// three vectors, for several examples at once, so that the sums stay in registers. Three vectors of 16 lanes are all
// units of a tile, and three of 8 are a half: the upper two of its rows, or the lower two.
//
// More than a third of the products would be by zeros, which are skipped where that is cheap: a row of the patch is
// multiplied by the vectors of which a unit sees it, and what is beyond the border of the map is not multiplied.
//
// No function keeps anything from call to call, so that threads may call at once.

#include <stdint.h>
#include <string.h>
#if BF16 && __AVX512BF16__
#include <immintrin.h>
#endif

enum { SIDE = 32, MAPS = 3, FIELD = 11, TILE = 4, PATCH = TILE + FIELD - 1, PADDED = SIDE + FIELD - 1 };
enum { ROW = PATCH * MAPS, UNITS = TILE * TILE * MAPS, UNIT_ROW = TILE * MAPS, MAP = SIDE * SIDE * MAPS };
#if __AVX512F__
enum { LANES = 16, EXAMPLES = 8, INPUTS = 7 };  // 32 registers have 24 or 21 sums
#else
enum { LANES = 8, EXAMPLES = 3, INPUTS = 3 };  // 16 registers have 9
#endif
enum { VECTORS = 3, SHARE = VECTORS * LANES, SHARES = UNITS / SHARE, SHARE_ROWS = TILE / SHARES };
_Static_assert(SHARE_ROWS * UNIT_ROW == SHARE && ROW <= UNITS && ROW % INPUTS == 0, "sizes fit");
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t cells __attribute__((vector_size(4 * LANES)));
typedef vec unaligned_vec __attribute__((aligned(4), may_alias));
typedef cells unaligned_cells __attribute__((aligned(4), may_alias));
typedef uint16_t half_cells __attribute__((vector_size(2 * LANES)));

#if BF16
typedef uint16_t number;
enum { GROUP = 2 };  // numbers of a cell

#if __AVX512BF16__
INLINE vec multiply_add(vec sums, cells a, cells b) {
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
#else
INLINE vec multiply_add(vec sums, cells a, cells b) {
    return sums + (vec)(a << 16) * (vec)(b << 16) + (vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u);
}
#endif

INLINE uint32_t pair(number low, number high) { return low | (uint32_t)high << 16; }

// To the nearest, ties to even, as PyTorch rounds. NaN stays NaN.
INLINE void narrow(number *p, vec x) {
    cells bits = (cells)x;
    cells rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    cells is_number = (cells)(x == x);
    half_cells upper = __builtin_convertvector((is_number & rounded) | (~is_number & 0x7fc0), half_cells);
    memcpy(p, &upper, sizeof upper);
}
#else
typedef float number;
enum { GROUP = 1 };

INLINE vec multiply_add(vec sums, cells a, cells b) { return sums + (vec)a * (vec)b; }

INLINE uint32_t pair(number low, number high) {
    uint32_t cell;
    (void)high;
    memcpy(&cell, &low, sizeof cell);
    return cell;
}

INLINE void narrow(number *p, vec x) { *(unaligned_vec *)p = x; }
#endif

INLINE cells load(const uint32_t *p) { return *(const unaligned_cells *)p; }

// GCC would rather read what is multiplied by several numbers from memory again each time.
#if __x86_64__ && !__AVX512F__
#define KEEP_IN_REGISTER(x) __asm__("" : "+x"(x))
#else
#define KEEP_IN_REGISTER(x) (void)(x)
#endif

// Sets `vectors`, from the first to before the end, to what is from p on.
INLINE void load_vectors(cells vectors[VECTORS], const uint32_t *p, int first, int end) {
    UNROLL for (int v = first; v < end; v++) {
        vectors[v] = load(p + v * LANES);
        KEEP_IN_REGISTER(vectors[v]);
    }
}

INLINE cells broadcast(const void *p) {
    uint32_t cell;
    memcpy(&cell, p, sizeof cell);
    return cell - (cells){0};
}

// Where the first unit of a tile's row is in a map, and the first input of its patch's row in a padded one.
INLINE int64_t units_at(int i, int j, int row) { return ((i * TILE + row) * SIDE + j * TILE) * MAPS; }
INLINE int64_t inputs_at(int i, int j, int row) { return ((i * TILE + row) * PADDED + j * TILE) * MAPS; }

// The rows of a patch, or the columns, that are within the map, from the first to before the end; its tile is the ith
// down, or to the right.
INLINE int first_inside(int i) { return FIELD / 2 > i * TILE ? FIELD / 2 - i * TILE : 0; }
INLINE int end_inside(int i) { return FIELD / 2 + SIDE < i * TILE + PATCH ? FIELD / 2 + SIDE - i * TILE : PATCH; }

// Of a share, the vectors of which a unit sees a row of the patch, from the first to before the end. The row is counted
// from the first one that the share sees. The units in row r of the share, 12r to 12r + 11, see its rows r to r + 10.
INLINE int first_vector(int row) { return row < FIELD ? 0 : (row - FIELD + 1) * UNIT_ROW / LANES; }
INLINE int end_vector(int row) {
    return row < SHARE_ROWS ? ((row + 1) * UNIT_ROW + LANES - 1) / LANES : VECTORS;
}

// Calls f with these vectors. They are constants, so that f's sums stay in registers.
#define WITH_VECTORS_OF_ROW(row, f, ...)                                                               \
    switch (row) {                                                                                     \
        case 0: f(__VA_ARGS__, first_vector(0), end_vector(0)); break;                                 \
        case 1: f(__VA_ARGS__, first_vector(1), end_vector(1)); break;                                 \
        case FIELD: f(__VA_ARGS__, first_vector(FIELD), end_vector(FIELD)); break;                     \
        case FIELD + 1: f(__VA_ARGS__, first_vector(FIELD + 1), end_vector(FIELD + 1)); break;         \
        case FIELD + 2: f(__VA_ARGS__, first_vector(FIELD + 2), end_vector(FIELD + 2)); break;         \
        default: f(__VA_ARGS__, 0, VECTORS);                                                           \
    }

// The rows of the patch that a share sees and that are within the map.
INLINE int first_seen(int i, int share) {
    int inside = first_inside(i), seen = share * SHARE_ROWS;
    return inside > seen ? inside : seen;
}
INLINE int end_seen(int i, int share) {
    int inside = end_inside(i), seen = (share + 1) * SHARE_ROWS + FIELD - 1;
    return inside < seen ? inside : seen;
}

// Adds the products of cells [first, end) of a row of the patch, which begins `at` so many numbers after `from`.
INLINE void multiply_row(vec sums[EXAMPLES][VECTORS], const number *const *from, int64_t at,
                         const uint32_t (*weights)[SHARE], int first, int end, int first_vector, int end_vector) {
    for (int k = first; k < end; k++) {
        cells of_units[VECTORS];
        load_vectors(of_units, weights[k], first_vector, end_vector);
        UNROLL for (int e = 0; e < EXAMPLES; e++) {
            cells input = broadcast(from[e] + at + k * GROUP);
            UNROLL for (int v = first_vector; v < end_vector; v++)
                sums[e][v] = multiply_add(sums[e][v], input, of_units[v]);
        }
    }
}

// out (n, 32, 32, 3): the products of padded x (n, 42, 42, 3) and weights (64, 588, 48).
void products(const number *restrict x, const number *restrict weights, int64_t n, number *restrict out) {
    const int64_t image = PADDED * PADDED * MAPS;
    for (int tile = 0; tile < (SIDE / TILE) * (SIDE / TILE); tile++) {
        int i = tile / (SIDE / TILE), j = tile % (SIDE / TILE);
        int first_cell = first_inside(j) * MAPS / GROUP, end_cell = (end_inside(j) * MAPS + GROUP - 1) / GROUP;
        for (int share = 0; share < SHARES; share++) {
            const number *own = weights + (int64_t)tile * PATCH * ROW * UNITS + share * SHARE;
            _Alignas(64) uint32_t packed[PATCH * ROW / GROUP][SHARE];
            for (int k = 0; k < PATCH * ROW / GROUP; k++)
                for (int u = 0; u < SHARE; u++)
                    packed[k][u] = pair(own[k * GROUP * UNITS + u], own[(k * GROUP + GROUP - 1) * UNITS + u]);
            for (int64_t first = 0; first < n; first += EXAMPLES) {
                const number *from[EXAMPLES];  // after the last example, the last one again
                for (int e = 0; e < EXAMPLES; e++) from[e] = x + (first + e < n ? first + e : n - 1) * image;
                vec sums[EXAMPLES][VECTORS] = {{{0}}};
                for (int row = first_seen(i, share); row < end_seen(i, share); row++)
                    WITH_VECTORS_OF_ROW(row - share * SHARE_ROWS, multiply_row, sums, from, inputs_at(i, j, row),
                                        packed + row * (ROW / GROUP), first_cell, end_cell)
                number found[EXAMPLES][SHARE];
                UNROLL for (int e = 0; e < EXAMPLES; e++)
                    UNROLL for (int v = 0; v < VECTORS; v++) narrow(found[e] + v * LANES, sums[e][v]);
                for (int e = 0; e < EXAMPLES && first + e < n; e++)
                    for (int row = 0; row < SHARE_ROWS; row++)
                        memcpy(out + (first + e) * MAP + units_at(i, j, share * SHARE_ROWS + row),
                               found[e] + row * UNIT_ROW, UNIT_ROW * sizeof *out);
            }
        }
    }
}

// paired (ceil(n / GROUP), length): x (n, length) with each GROUP of examples in cells; 0 after the last one.
static void pair_examples(const number *restrict x, int64_t n, int64_t length, uint32_t *restrict paired) {
    for (int64_t first = 0; first < n; first += GROUP, paired += length) {
        const number *one = x + first * length, *two = one + (GROUP - 1) * length;
        if (first + GROUP <= n)
            for (int64_t k = 0; k < length; k++) paired[k] = pair(one[k], two[k]);
        else
            for (int64_t k = 0; k < length; k++) paired[k] = pair(one[k], 0);
    }
}

// Sets sums to the products of INPUTS inputs (groups, 42) and a share's units, summed over examples.
INLINE void sum_examples(vec sums[INPUTS][VECTORS], const uint32_t *inputs, const uint32_t *units, int64_t groups,
                         int first_vector, int end_vector) {
    for (int64_t g = 0; g < groups; g++) {
        cells of_units[VECTORS];
        load_vectors(of_units, units + g * SHARE, first_vector, end_vector);
        UNROLL for (int k = 0; k < INPUTS; k++) {
            cells input = broadcast(inputs + g * ROW + k);
            UNROLL for (int v = first_vector; v < end_vector; v++)
                sums[k][v] = multiply_add(sums[k][v], input, of_units[v]);
        }
    }
}

// gradient (64, 588, 48): products of padded x (n, 42, 42, 3) and d (n, 32, 32, 3), summed over examples; 0 where a
// unit sees nothing. `scratch` has room for ceil(n / GROUP) * (42 * 42 * 3 + 32 * 32 * 3 + 42 + 48) cells.
void outer(const number *restrict x, const number *restrict d, int64_t n, uint32_t *restrict scratch,
           number *restrict gradient) {
    const int64_t image = PADDED * PADDED * MAPS, groups = (n + GROUP - 1) / GROUP;
    uint32_t *all_inputs = scratch, *all_units = all_inputs + groups * image;
    uint32_t *inputs = all_units + groups * MAP, *units = inputs + groups * ROW;
    uint32_t near[PATCH][2][UNITS];  // all ones where a unit sees this row, and this column, of the patch
    for (int at = 0; at < PATCH; at++)
        for (int u = 0; u < UNITS; u++) {
            int row = u / UNIT_ROW, column = u % UNIT_ROW / MAPS;
            near[at][0][u] = row <= at && at < row + FIELD ? ~0u : 0;
            near[at][1][u] = column <= at && at < column + FIELD ? ~0u : 0;
        }
    pair_examples(x, n, image, all_inputs);
    pair_examples(d, n, MAP, all_units);
    for (int tile = 0; tile < (SIDE / TILE) * (SIDE / TILE); tile++) {
        int i = tile / (SIDE / TILE), j = tile % (SIDE / TILE);
        for (int row = 0; row < TILE; row++) {
            uint32_t *own = units + row / SHARE_ROWS * groups * SHARE + row % SHARE_ROWS * UNIT_ROW;
            for (int64_t g = 0; g < groups; g++)
                memcpy(own + g * SHARE, all_units + g * MAP + units_at(i, j, row), UNIT_ROW * sizeof *units);
        }
        for (int row = 0; row < PATCH; row++) {
            int is_inside = first_inside(i) <= row && row < end_inside(i);
            for (int64_t g = 0; g < groups && is_inside; g++)
                memcpy(inputs + g * ROW, all_inputs + g * image + inputs_at(i, j, row), ROW * sizeof *inputs);
            for (int share = 0; share < SHARES; share++)
                for (int first = 0; first < ROW; first += INPUTS) {
                    int is_seen = first_seen(i, share) <= row && row < end_seen(i, share);
                    vec sums[INPUTS][VECTORS] = {{{0}}};
                    if (is_seen && first + INPUTS > first_inside(j) * MAPS && first < end_inside(j) * MAPS)
                        WITH_VECTORS_OF_ROW(row - share * SHARE_ROWS, sum_examples, sums, inputs + first,
                                            units + share * groups * SHARE, groups)
                    UNROLL for (int k = 0; k < INPUTS; k++) {
                        int64_t to = ((int64_t)tile * PATCH * ROW + row * ROW + first + k) * UNITS;
                        UNROLL for (int v = 0; v < VECTORS; v++) {
                            int u = share * SHARE + v * LANES;
                            cells seen = load(near[row][0] + u) & load(near[(first + k) / MAPS][1] + u);
                            narrow(gradient + to + u, (vec)((cells)sums[k][v] & seen));
                        }
                    }
                }
        }
    }
}

// Adds to gradient (n, 32, 32, 3) that by the inputs, where d (n, 32, 32, 3) is that by the products.
void back(const number *restrict d, const number *restrict weights, int64_t n, float *restrict gradient) {
    for (int tile = 0; tile < (SIDE / TILE) * (SIDE / TILE); tile++) {
        int i = tile / (SIDE / TILE), j = tile % (SIDE / TILE);
        const number *own = weights + (int64_t)tile * PATCH * ROW * UNITS;
        _Alignas(64) uint32_t packed[PATCH][UNITS / GROUP][UNITS];  // inputs are in the lanes
        memset(packed, 0, sizeof packed);
        for (int k = 0; k < PATCH * ROW; k++)
            for (int u = 0; u < UNITS / GROUP; u++)
                memcpy(&packed[k / ROW][u][k % ROW], own + k * UNITS + u * GROUP, sizeof ***packed);
        for (int64_t first = 0; first < n; first += EXAMPLES) {
            const number *from[EXAMPLES];
            for (int e = 0; e < EXAMPLES; e++) from[e] = d + (first + e < n ? first + e : n - 1) * MAP;
            for (int row = first_inside(i); row < end_inside(i); row++) {
                int64_t to = ((int64_t)(i * TILE + row - FIELD / 2) * SIDE + j * TILE - FIELD / 2) * MAPS;
                // The units in rows row - 10 to row of the tile see this row of the patch.
                int first_row = row < FIELD ? 0 : row - FIELD + 1, end_row = row < TILE ? row + 1 : TILE;
                for (int lane = 0; lane < UNITS; lane += SHARE) {
                    vec sums[EXAMPLES][VECTORS] = {{{0}}};
                    for (int u_row = first_row; u_row < end_row; u_row++)
                        for (int u = 0; u < UNIT_ROW / GROUP; u++) {
                            int64_t at = units_at(i, j, u_row) + u * GROUP;
                            cells of_inputs[VECTORS];
                            load_vectors(of_inputs, packed[row][u_row * UNIT_ROW / GROUP + u] + lane, 0, VECTORS);
                            UNROLL for (int e = 0; e < EXAMPLES; e++) {
                                cells unit = broadcast(from[e] + at);
                                UNROLL for (int v = 0; v < VECTORS; v++)
                                    sums[e][v] = multiply_add(sums[e][v], unit, of_inputs[v]);
                            }
                        }
                    int begin = first_inside(j) * MAPS - lane, end = end_inside(j) * MAPS - lane;
                    begin = begin > 0 ? begin : 0, end = end < SHARE ? end : SHARE;
                    float found[EXAMPLES][SHARE];
                    UNROLL for (int e = 0; e < EXAMPLES; e++)
                        UNROLL for (int v = 0; v < VECTORS; v++) *(unaligned_vec *)(found[e] + v * LANES) = sums[e][v];
                    for (int e = 0; e < EXAMPLES && first + e < n; e++) {
                        float *under = gradient + (first + e) * MAP + to + lane;
                        for (int k = begin; k < end; k++) under[k] += found[e][k];
                    }
                }
            }
        }
    }
}
