// Products of tokens with a whole frozen matrix, fp32.
//
// The matrix stays as it is, so that one copy serves both directions and the embedding that it may be tied to. Panels of
// it are packed on the way, and widened where bf16 holds it exactly: each once in a product, for all tokens. A number of the result is summed in the same order
// however the work is split.
//
// For processors with AVX2 and nothing wider, on which PyTorch's own product is slower.

#pragma once

#include <algorithm>

#include "few_rows.h"
#include "products.h"
#include "threads.h"

namespace {

// Steps of a sum whose panels stay in the second cache together with the tokens' numbers, and those after which all
// threads continue with the next ones, so that long rows of tokens are still in the last cache for each panel.
constexpr int64_t STEPS_AT_ONCE = 640, STEPS_TOGETHER = 4096, MOST_PANELS = 6;

// out[rows][count] (+)= left · panels, of which each has `steps` numbers; `left(row)` is where a row of the left matrix
// is.
template <class Left>
void multiply_panels(Left left, int64_t rows, const float *panels, int64_t steps, int64_t count, bool adds, float *out,
                     int64_t out_stride) {
    float edge[TILE * COLUMNS];
    for (int64_t row = 0; row < rows; row += TILE) {
        const float *own[TILE];
        for (int64_t i = 0; i < TILE; ++i) own[i] = left(std::min(row + i, rows - 1));
        for (int64_t column = 0; column < count; column += COLUMNS) {
            const float *panel = panels + column * steps;
            float *to = out + row * out_stride + column;
            if (row + TILE <= rows && column + COLUMNS <= count) {
                for (int64_t i = 0; i < TILE; ++i) __builtin_prefetch(to + i * out_stride, 1);
                if (adds)
                    tile<float, true, TILE>(own, sizeof(float), panel, steps, to, out_stride);
                else
                    tile<float, false, TILE>(own, sizeof(float), panel, steps, to, out_stride);
                continue;
            }
            tile<float, false, TILE>(own, sizeof(float), panel, steps, edge, COLUMNS);
            const int64_t here = std::min<int64_t>(count - column, COLUMNS);
            for (int64_t i = 0; i < TILE && row + i < rows; ++i) {
                for (int64_t j = 0; j < here; ++j) {
                    float *at = to + i * out_stride + j;
                    *at = edge[i * COLUMNS + j] + (adds ? *at : 0.0f);
                }
            }
        }
    }
}

// out[tokens][columns] = x[tokens][width] · right. `pack(from, count, first, steps, panels)` packs `count` columns of the
// right matrix from `from` on, and of their numbers `steps` from `first` on.
template <class Pack>
void multiply(const float *x, int64_t x_stride, float *out, int64_t out_stride, int64_t tokens, int64_t width,
              int64_t columns, Pack pack) {
    const int64_t panels = up(columns, COLUMNS);
    const int64_t threads = omp_get_max_threads();
    // Several tasks for each thread, so that one whose core is taken away does not hold up the others.
    const int64_t together = std::clamp<int64_t>(panels / (4 * threads), 1, MOST_PANELS);
    const int64_t at_once = up(width, up(width, STEPS_AT_ONCE));
    const int64_t parts = up(panels, together);
    Tasks tasks;
    in_threads([=, &tasks] {
        Buffer<float> packed(together * COLUMNS * at_once);
        for (int64_t begin = 0, done = parts; begin < width; begin += STEPS_TOGETHER, done += parts) {
            const int64_t end = std::min(width, begin + STEPS_TOGETHER);
            for (int64_t task; (task = tasks.take(done)) >= 0;) {
                const int64_t from = task % parts * together * COLUMNS;
                const int64_t count = std::min(columns - from, together * COLUMNS);
                for (int64_t first = begin; first < end; first += at_once) {
                    const int64_t steps = std::min(end - first, at_once);
                    pack(from, count, first, steps, packed.get());
                    multiply_panels([&](int64_t token) { return x + token * x_stride + first; }, tokens, packed.get(),
                                    steps, count, first != 0, out + from, out_stride);
                }
            }
            GOMP_barrier();  // the next steps add to what all threads have written
        }
    });
}

// A matrix ``[outputs, inputs + rank]``: frozen columns, in bf16 where that is exact, and the adapters', which change.
template <class T>
struct Matrix {
    const T *frozen;
    const float *changing;
    int64_t outputs, inputs, rank;

    int64_t width() const { return inputs + rank; }

    // Panels of `count` rows from `from` on, of their numbers `steps` from `first` on.
    void pack_rows_as_columns(int64_t from, int64_t count, int64_t first, int64_t steps, float *panels) const {
        const int64_t own = std::clamp<int64_t>(inputs - first, 0, steps), behind = std::max(first - inputs, int64_t(0));
        for (int64_t at = 0; at < count; at += COLUMNS, panels += steps * COLUMNS) {
            const T *left[COLUMNS];
            const float *right[COLUMNS];
            const int64_t here = std::min<int64_t>(count - at, COLUMNS);
            for (int64_t j = 0; j < here; ++j) {
                left[j] = frozen + (from + at + j) * inputs + first;
                right[j] = changing + (from + at + j) * rank + behind;
            }
            turn_panel(left, here, own, panels);
            turn_panel(right, here, steps - own, panels + own * COLUMNS);
        }
    }

    // Panels of `count` columns from `from` on, of their numbers `steps` from `first` on. Rows that will be read are fetched
    // ahead: they lie apart, so the processor doesn't foresee them.
    void pack_columns_as_rows(int64_t from, int64_t count, int64_t first, int64_t steps, float *panels) const {
        constexpr int64_t AHEAD = 12, NUMBERS = 64 / sizeof(T);
        const int64_t whole = std::clamp<int64_t>(inputs - from, 0, count) / COLUMNS * COLUMNS;
        for (int64_t step = 0; step < steps; ++step) {
            const T *row = frozen + (first + step) * inputs + from;
            float *to = panels + step * COLUMNS;
            if (step + AHEAD < steps) {
                for (int64_t j = 0; j < whole; j += NUMBERS) __builtin_prefetch(row + AHEAD * inputs + j);
            }
            for (int64_t j = 0; j < whole; j += COLUMNS, to += steps * COLUMNS) {
                EACH (int64_t i = 0; i < COLUMNS; ++i) to[i] = get(row + j + i);
            }
            for (int64_t j = whole; j < count; j += COLUMNS, to += steps * COLUMNS) {
                for (int64_t i = 0; i < COLUMNS; ++i) to[i] = j + i < count ? number(first + step, from + j + i) : 0.0f;
            }
        }
    }

   private:
    float number(int64_t row, int64_t column) const {
        return column < inputs ? get(frozen + row * inputs + column) : changing[row * rank + column - inputs];
    }
};

// out = x · matrixᵀ.
template <class T>
void product_forward(const Matrix<T> *matrix, const float *x, int64_t x_stride, float *out, int64_t tokens) {
    const Matrix<T> m = *matrix;
    if (tokens <= FEW_ROWS) return multiply_few(m, x, x_stride, out, tokens);
    multiply(x, x_stride, out, m.outputs, tokens, m.width(), m.outputs,
             [&](auto... what) { m.pack_rows_as_columns(what...); });
}

// out = d_out · matrix.
template <class T>
void product_backward(const Matrix<T> *matrix, const float *d_out, int64_t d_out_stride, float *out, int64_t tokens) {
    const Matrix<T> m = *matrix;
    multiply(d_out, d_out_stride, out, m.width(), tokens, m.outputs, m.width(),
             [&](auto... what) { m.pack_columns_as_rows(what...); });
}

}  // namespace
