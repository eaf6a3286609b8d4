// The three products of a linear layer, on the register tiles of simd.h. Every sum runs in an order that depends on
// the shapes alone, and a row of y on its own row of x alone.
#include "linear.h"

#include "pack.h"
#include "workspace.h"

namespace swirl::SWIRL_ISA {
namespace {

constexpr int BLOCK = 64;   // rows of a task
constexpr int CHUNK = 256;  // tokens of dw packed at a time: a panel of them fits the first-level cache

// C (rows x columns) = A B for B packed in panels over `steps`. What does not fill whole tiles goes through scratch,
// ROWS * (steps + columns rounded up to panels) floats.
void rows_of_product(int64_t rows, int64_t columns, int64_t steps, const float* a, const float* b, float* c,
                     float* scratch) {
    int64_t whole = columns % PANEL<float> ? 0 : rows / ROWS * ROWS, padded = round_up(columns, PANEL<float>);
    product<float, float>(whole, columns, steps, a, steps, 1, b, c, columns, false);
    float *a_padded = scratch, *c_padded = scratch + ROWS * steps;
    for (int64_t row = whole; row < rows; row += ROWS) {
        int64_t live = rows - row < ROWS ? rows - row : ROWS;
        memcpy(a_padded, a + row * steps, live * steps * sizeof(float));
        memset(a_padded + live * steps, 0, (ROWS - live) * steps * sizeof(float));
        product<float, float>(ROWS, padded, steps, a_padded, steps, 1, b, c_padded, padded, false);
        for (int64_t i = 0; i < live; i++)
            memcpy(c + (row + i) * columns, c_padded + i * padded, columns * sizeof(float));
    }
}

// rows_of_product over all of M, with `pack(panel, to)` making each panel of the right-hand side first.
template <class Pack>
bool tall_product(const Linear& p, int64_t columns, int64_t steps, const float* a, float* c, Pack pack) {
    int64_t panels = round_up(columns, PANEL<float>) / PANEL<float>, panel_size = steps * PANEL<float>;
    int64_t blocks = (p.M + BLOCK - 1) / BLOCK, scratch_size = round_up(ROWS * (steps + panels * PANEL<float>), 16);
    float* memory = (float*)acquire((panels * panel_size + scratch_size * p.threads) * sizeof(float));
    if (!memory) return false;
    int next_thread = 0;
#pragma omp parallel num_threads(p.threads)
    {
        float* scratch =
            memory + panels * panel_size + scratch_size * __atomic_fetch_add(&next_thread, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < panels; i++) pack(i * PANEL<float>, memory + i * panel_size);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks; i++) {
            int64_t row = i * BLOCK, rows = p.M - row < BLOCK ? p.M - row : BLOCK;
            rows_of_product(rows, columns, steps, a + row * steps, memory, c + row * columns, scratch);
        }
    }
    release((char*)memory);
    return true;
}

}  // namespace

bool linear_fwd(const Linear& p) {
    return tall_product(p, p.N, p.K, p.x, p.y, [&](int64_t start, float* to) {  // w turned
        for (int64_t k = 0; k < p.K; k++)
            for (int lane = 0; lane < PANEL<float>; lane++)
                *to++ = start + lane < p.N ? p.w[(start + lane) * p.K + k] : 0;
    });
}

bool linear_dx(const Linear& p) {
    return tall_product(p, p.K, p.N, p.dy, p.dx, [&](int64_t start, float* to) {
        pack_panels(p.w + start, p.K, p.N, p.N, p.K - start < PANEL<float> ? p.K - start : PANEL<float>, to);
    });
}

// A task owns a tile of dw and walks over all tokens, a chunk at a time. dy is read as it lies, but for the rows of dw
// that do not fill the registers.
bool linear_dw(const Linear& p) {
    constexpr int TILE_ROWS = 2 * BLOCK;
    int64_t row_tiles = (p.N + TILE_ROWS - 1) / TILE_ROWS, column_tiles = (p.K + PANEL<float> - 1) / PANEL<float>;
    constexpr int64_t sums_size = TILE_ROWS * PANEL<float>, x_size = CHUNK * PANEL<float>, dy_size = CHUNK * ROWS;
    constexpr int64_t scratch_size = sums_size + x_size + dy_size;
    float* memory = (float*)acquire(p.threads * scratch_size * sizeof(float));
    if (!memory) return false;
    int next_thread = 0;
#pragma omp parallel num_threads(p.threads)
    {
        float* sums = memory + scratch_size * __atomic_fetch_add(&next_thread, 1, __ATOMIC_RELAXED);
        float *x = sums + sums_size, *dy = x + x_size;
#pragma omp for schedule(dynamic)
        for (int64_t tile = 0; tile < row_tiles * column_tiles; tile++) {
            int64_t n0 = tile / column_tiles * TILE_ROWS, k0 = tile % column_tiles * PANEL<float>;
            int64_t rows = p.N - n0 < TILE_ROWS ? p.N - n0 : TILE_ROWS;
            int64_t columns = p.K - k0 < PANEL<float> ? p.K - k0 : PANEL<float>, whole = rows / ROWS * ROWS;
            memset(sums, 0, sums_size * sizeof(float));
            for (int64_t m = 0; m < p.M; m += CHUNK) {
                int64_t steps = p.M - m < CHUNK ? p.M - m : CHUNK;
                const float* tile_dy = p.dy + m * p.N + n0;
                pack_panels(p.x + m * p.K + k0, p.K, steps, steps, columns, x);
                product<float, float>(whole, PANEL<float>, steps, tile_dy, 1, p.N, x, sums, PANEL<float>, true);
                if (whole == rows) continue;
                pack_panels<ROWS>(tile_dy + whole, p.N, steps, steps, rows - whole, dy);
                product<float, float>(ROWS, PANEL<float>, steps, dy, 1, ROWS, x, sums + whole * PANEL<float>,
                                      PANEL<float>, true);
            }
            for (int64_t i = 0; i < rows; i++)
                memcpy(p.dw + (n0 + i) * p.K + k0, sums + i * PANEL<float>, columns * sizeof(float));
        }
    }
    release((char*)memory);
    return true;
}

}  // namespace swirl::SWIRL_ISA
