// The elementwise parts of a training step, fused: each function reads its inputs once and writes its outputs once.

#pragma once

#include <cstdint>

#include "numbers.h"
#include "products.h"
#include "threads.h"

namespace {

// A norm's weight as it is stored, or less 1. The kind is known to the compiler, so that the sums of one don't change with
// the other.
struct Stored {
    template <class T>
    static float of(const T *weight) {
        return get(weight);
    }
};

struct LessOne {
    template <class T>
    static float of(const T *weight) {
        return get(weight) + 1.0f;
    }
};

// sum = x + added (when there is an `added`), and its root-mean-square normalisation times the weight.
template <class Weight, class T>
void norm_forward(const T *x, const T *added, T *sum, const T *weight, T *out, float *factor, int64_t rows,
                  int64_t width, int64_t out_stride, float epsilon) {
    for_rows(rows, [=](int64_t row) {
        const T *own = x + row * width;
        if (added != nullptr) {
            const T *other = added + row * width;
            T *both = sum + row * width;
            EACH (int64_t i = 0; i < width; ++i) put(both + i, get(own + i) + get(other + i));
            own = both;
        }
        float squares = 0;
        for (int64_t i = 0; i < width; ++i) squares += get(own + i) * get(own + i);
        float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + epsilon);
        factor[row] = scale;
        T *result = out + row * out_stride;
        EACH (int64_t i = 0; i < width; ++i) put(result + i, get(own + i) * scale * Weight::of(weight + i));
    });
}

// A gradient of linear layers' input in two parts: ``whole [rows, width]`` and, behind it in each row,
// ``low [rows, rank]``, which stands for its product with ``down [rank, width]``.
template <class T>
struct Split {
    const T *whole, *down;
    int64_t width, rank, stride;
};

// Such a gradient, read in tiles: some columns of TILE rows at once.
template <class T>
struct Tiles {
    typedef typename Word<T>::type word;
    const Split<T> split;
    const int64_t steps;
    Buffer<word> panels;

    explicit Tiles(const Split<T> &given)
        : split(given),
          steps(up(given.rank, Word<T>::NUMBERS)),
          panels(steps * up(given.width, COLUMNS) * COLUMNS) {
        pack_rows<T>(split.rank, split.width, [&](int64_t at) { return split.down + at * split.width; }, panels.get());
    }

    // Rows from `row` on, columns from `from` on, into ``out[TILE][stride]``; `from` is a multiple of COLUMNS, and there
    // is space for whole panels. Behind the last row stands the last row.
    void read(int64_t row, int64_t rows, int64_t from, int64_t columns, float *out, int64_t stride) const {
        constexpr int64_t MOST = 64;  // words of a row's middle that are taken at once
        word low[TILE][MOST];
        const word *left[TILE];
        for (int64_t i = 0; i < TILE; ++i) {
            const T *own = line(row + i, rows) + from;
            EACH (int64_t j = 0; j < columns; ++j) out[i * stride + j] = get(own + j);
            left[i] = low[i];
        }
        for (int64_t step = 0; step < steps; step += MOST) {
            const int64_t count = steps - step < MOST ? steps - step : MOST;
            for (int64_t i = 0; i < TILE; ++i) {
                const T *own = line(row + i, rows) + split.width;
                for (int64_t j = 0; j < count; ++j) {
                    const int64_t at = (step + j) * Word<T>::NUMBERS;
                    low[i][j] = at + Word<T>::NUMBERS > split.rank ? Word<T>::alone(own + at) : Word<T>::of(own + at, 1);
                }
            }
            for (int64_t j = 0; j < columns; j += COLUMNS)
                tile<T, true, TILE>(left, sizeof(word), panels.get() + (from + j) * steps + step * COLUMNS, count,
                                    out + j, stride);
        }
    }

   private:
    const T *line(int64_t row, int64_t rows) const { return split.whole + (row < rows ? row : rows - 1) * split.stride; }
};

// The whole gradient, ``[rows, width]``.
template <class T>
void join(const Split<T> *given, T *out, int64_t rows) {
    const Tiles<T> tiles(*given);
    const int64_t width = given->width, stride = up(width, COLUMNS) * COLUMNS;
    in_threads([=, &tiles] {
        Buffer<float> buffer(TILE * stride);
        const Share share(up(rows, TILE));
        for (int64_t first = share.first * TILE; first < rows && first < share.last * TILE; first += TILE) {
            tiles.read(first, rows, 0, width, buffer.get(), stride);
            for (int64_t row = first; row < first + TILE && row < rows; ++row) {
                const float *own = buffer.get() + (row - first) * stride;
                EACH (int64_t i = 0; i < width; ++i) put(out + row * width + i, own[i]);
            }
        }
    });
}

// The gradient of `norm_forward`'s sum, plus `added`.
template <class Weight, class T>
void norm_backward(const Split<T> *d_out, const T *x, const T *weight, const float *factor, const T *added, T *d_x,
                   int64_t rows) {
    const Tiles<T> tiles(*d_out);
    const int64_t width = d_out->width, stride = up(width, COLUMNS) * COLUMNS;
    in_threads([=, &tiles] {
        Buffer<float> buffer(TILE * stride);
        const Share share(up(rows, TILE));
        for (int64_t first = share.first * TILE; first < rows && first < share.last * TILE; first += TILE) {
            tiles.read(first, rows, 0, width, buffer.get(), stride);
            for (int64_t row = first; row < first + TILE && row < rows; ++row) {
                const float *d = buffer.get() + (row - first) * stride;
                const T *own = x + row * width;
                float scale = factor[row], shared = 0;
                for (int64_t i = 0; i < width; ++i) shared += d[i] * Weight::of(weight + i) * get(own + i);
                shared *= scale * scale / static_cast<float>(width);
                T *result = d_x + row * width;
                if (added == nullptr) {
                    EACH (int64_t i = 0; i < width; ++i)
                        put(result + i, (d[i] * Weight::of(weight + i) - get(own + i) * shared) * scale);
                } else {
                    const T *other = added + row * width;
                    EACH (int64_t i = 0; i < width; ++i)
                        put(result + i,
                            (d[i] * Weight::of(weight + i) - get(own + i) * shared) * scale + get(other + i));
                }
            }
        }
    });
}

// Activations are x · sigmoid(h(x)): h, and what x · h'(x) is.
struct Silu {
    static float inner(float x) { return x; }
    static float slope(float x) { return x; }
};

// GELU by tanh (Hendrycks and Gimpel, 2016).
struct Gelu {
    static constexpr float FACTOR = 1.5957691216057308f, CUBIC = 0.044715f;  // 2 · sqrt(2 / π)
    static float inner(float x) { return FACTOR * x * (1.0f + CUBIC * x * x); }
    static float slope(float x) { return FACTOR * x * (1.0f + 3.0f * CUBIC * x * x); }
};

// out = activation(gate) * up, gate and up side by side.
template <class Activation, class T>
void gated_forward(const T *gate_up, T *out, int64_t rows, int64_t width, int64_t out_stride) {
    for_rows(rows, [=](int64_t row) {
        const T *gate = gate_up + row * 2 * width, *up = gate + width;
        T *result = out + row * out_stride;
        EACH (int64_t i = 0; i < width; ++i) {
            float g = get(gate + i);
            put(result + i, g * sigmoid(Activation::inner(g)) * get(up + i));
        }
    });
}

template <class Activation, class T>
void gated_backward(const Split<T> *d_out, const T *gate_up, T *d_gate_up, int64_t rows) {
    const Tiles<T> tiles(*d_out);
    const int64_t width = d_out->width;
    constexpr int64_t AT_ONCE = 8 * COLUMNS;
    for_rows(up(rows, TILE), [=, &tiles](int64_t number) {
        const int64_t first = number * TILE;
        float buffer[TILE * AT_ONCE];
        for (int64_t from = 0; from < width; from += AT_ONCE) {
            const int64_t count = width - from < AT_ONCE ? width - from : AT_ONCE;
            tiles.read(first, rows, from, count, buffer, AT_ONCE);
            for (int64_t row = first; row < first + TILE && row < rows; ++row) {
                const float *d = buffer + (row - first) * AT_ONCE;
                const T *gate = gate_up + row * 2 * width + from, *up = gate + width;
                T *d_gate = d_gate_up + row * 2 * width + from, *d_up = d_gate + width;
                EACH (int64_t i = 0; i < count; ++i) {
                    float g = get(gate + i), s = sigmoid(Activation::inner(g));
                    put(d_up + i, d[i] * g * s);
                    put(d_gate + i, d[i] * get(up + i) * s * (1.0f + Activation::slope(g) * (1.0f - s)));
                }
            }
        }
    });
}

// Each row's cross-entropy; logits become its gradient times `scale`.
template <class T>
void cross_entropy(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t width, float scale) {
    for_rows(rows, [=](int64_t row) {
        T *own = logits + row * width;
        const float highest = highest_of(own, width);
        float sum = 0;
        for (int64_t i = 0; i < width; ++i) sum += fast_exp(get(own + i) - highest);
        const float target = get(own + targets[row]), share = scale / sum;
        losses[row] = __builtin_logf(sum) + highest - target;
        EACH (int64_t i = 0; i < width; ++i) put(own + i, fast_exp(get(own + i) - highest) * share);
        put(own + targets[row], (fast_exp(target - highest) / sum - 1.0f) * scale);
    });
}

// Logits are multiplied by `factor` and, unless `cap` is 0, capped.
template <class T>
void scale_logits(T *logits, int64_t rows, int64_t width, float factor, float cap) {
    for_rows(rows, [=](int64_t row) {
        T *own = logits + row * width;
        if (cap == 0) {
            EACH (int64_t i = 0; i < width; ++i) put(own + i, get(own + i) * factor);
        } else {
            EACH (int64_t i = 0; i < width; ++i) put(own + i, capped(get(own + i) * factor, cap));
        }
    });
}

// As `cross_entropy`, of what `scale_logits` left: the gradient is that of its input.
template <class T>
void scaled_cross_entropy(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t width, float scale,
                          float factor, float cap) {
    for_rows(rows, [=](int64_t row) {
        T *own = logits + row * width;
        const float highest = highest_of(own, width);
        float sum = 0;
        for (int64_t i = 0; i < width; ++i) sum += fast_exp(get(own + i) - highest);
        const float target = get(own + targets[row]), share = scale * factor / sum;
        losses[row] = __builtin_logf(sum) + highest - target;
        if (cap == 0) {
            EACH (int64_t i = 0; i < width; ++i) put(own + i, fast_exp(get(own + i) - highest) * share);
        } else {
            EACH (int64_t i = 0; i < width; ++i) {
                const float y = get(own + i);
                put(own + i, fast_exp(y - highest) * share * slope_of_capped(y, cap));
            }
        }
        const float slope = cap == 0 ? factor : factor * slope_of_capped(target, cap);
        put(own + targets[row], (fast_exp(target - highest) / sum - 1.0f) * scale * slope);
    });
}

// A small matrix into places of a larger one's memory; a number's place is the sum of its row's and its column's.
template <class T>
void place(const float *values, const int64_t *row_places, const int64_t *column_places, T *memory, int64_t rows,
           int64_t columns) {
    for_rows(rows, [=](int64_t row) {
        for (int64_t i = 0; i < columns; ++i)
            put(memory + row_places[row] + column_places[i], values[row * columns + i]);
    });
}

}  // namespace
