// The elementwise parts of a training step, fused: each function reads its inputs once and writes its outputs once.

#pragma once

#include <cstdint>
#include <vector>

#include "numbers.h"

namespace {

// sum = x + added (when there is an `added`), and its root-mean-square normalisation times the weight.
template <class T>
void norm_forward(const T *x, const T *added, T *sum, const T *weight, T *out, float *factor, int64_t rows,
                  int64_t width, int64_t out_stride, float epsilon) {
    ROWS(int64_t row = 0; row < rows; ++row) {
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
        EACH (int64_t i = 0; i < width; ++i) put(result + i, get(own + i) * scale * get(weight + i));
    }
}

// A gradient of linear layers' input in two parts: ``whole [rows, width]`` and, behind it in each row,
// ``low [rows, rank]``, which stands for its product with ``down [rank, width]``.
template <class T>
struct Split {
    const T *whole, *down;
    int64_t width, rank, stride;

    // Numbers `from` to before ``from + BLOCK`` of a row, or as many as there are.
    void read(int64_t row, int64_t from, float *out) const {
        const T *own = whole + row * stride, *low = own + width;
        const int64_t count = width - from < BLOCK ? width - from : BLOCK;
        if (count == BLOCK) {
            read_block<BLOCK>(own + from, low, from, out, BLOCK);
        } else {
            read_block<1>(own + from, low, from, out, count);
        }
    }

    void read_row(int64_t row, float *out) const {
        for (int64_t from = 0; from < width; from += BLOCK) read(row, from, out + from);
    }

    static constexpr int64_t BLOCK = 128;

   private:
    template <int64_t SIZE>
    void read_block(const T *own, const T *low, int64_t from, float *out, int64_t count) const {
        const int64_t size = SIZE == BLOCK ? SIZE : count;
        float sum[BLOCK];
        for (int64_t i = 0; i < size; ++i) sum[i] = get(own + i);
        for (int64_t r = 0; r < rank; ++r) {
            const float share = get(low + r);
            const T *line = down + r * width + from;
            for (int64_t i = 0; i < size; ++i) sum[i] += share * get(line + i);
        }
        for (int64_t i = 0; i < size; ++i) out[i] = sum[i];
    }
};

// The gradient of `norm_forward`'s sum, plus `added`.
template <class T>
void norm_backward(const Split<T> *d_out, const T *x, const T *weight, const float *factor, const T *added, T *d_x,
                   int64_t rows) {
    const Split<T> split = *d_out;
    const int64_t width = split.width;
    // Each thread's own copy of one row.
    std::vector<float> room(static_cast<size_t>(width));
#pragma omp parallel for schedule(static) firstprivate(room)
    for (int64_t row = 0; row < rows; ++row) {
        float *d = room.data();
        split.read_row(row, d);
        const T *own = x + row * width;
        float scale = factor[row], shared = 0;
        for (int64_t i = 0; i < width; ++i) shared += d[i] * get(weight + i) * get(own + i);
        shared *= scale * scale / static_cast<float>(width);
        T *result = d_x + row * width;
        if (added == nullptr) {
            EACH (int64_t i = 0; i < width; ++i)
                put(result + i, (d[i] * get(weight + i) - get(own + i) * shared) * scale);
        } else {
            const T *other = added + row * width;
            EACH (int64_t i = 0; i < width; ++i)
                put(result + i, (d[i] * get(weight + i) - get(own + i) * shared) * scale + get(other + i));
        }
    }
}

// out = silu(gate) * up, gate and up side by side.
template <class T>
void swiglu_forward(const T *gate_up, T *out, int64_t rows, int64_t width, int64_t out_stride) {
    ROWS(int64_t row = 0; row < rows; ++row) {
        const T *gate = gate_up + row * 2 * width, *up = gate + width;
        T *result = out + row * out_stride;
        EACH (int64_t i = 0; i < width; ++i) {
            float g = get(gate + i);
            put(result + i, g * sigmoid(g) * get(up + i));
        }
    }
}

template <class T>
void swiglu_backward(const Split<T> *d_out, const T *gate_up, T *d_gate_up, int64_t rows) {
    const Split<T> split = *d_out;
    const int64_t width = split.width;
    ROWS(int64_t row = 0; row < rows; ++row) {
        const T *gate = gate_up + row * 2 * width, *up = gate + width;
        T *d_gate = d_gate_up + row * 2 * width, *d_up = d_gate + width;
        for (int64_t from = 0; from < width; from += Split<T>::BLOCK) {
            float d[Split<T>::BLOCK];
            split.read(row, from, d);
            const int64_t last = width - from < Split<T>::BLOCK ? width - from : Split<T>::BLOCK;
            EACH (int64_t i = 0; i < last; ++i) {
                float g = get(gate + from + i), s = sigmoid(g);
                put(d_up + from + i, d[i] * g * s);
                put(d_gate + from + i, d[i] * get(up + from + i) * s * (1.0f + g * (1.0f - s)));
            }
        }
    }
}

// Each row's cross-entropy; logits become its gradient times `scale`.
template <class T>
void cross_entropy(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t width, float scale) {
    ROWS(int64_t row = 0; row < rows; ++row) {
        T *own = logits + row * width;
        float highest = get(own), sum = 0;
        for (int64_t i = 0; i < width; ++i) highest = get(own + i) > highest ? get(own + i) : highest;
        for (int64_t i = 0; i < width; ++i) sum += fast_exp(get(own + i) - highest);
        const float target = get(own + targets[row]), share = scale / sum;
        losses[row] = __builtin_logf(sum) + highest - target;
        EACH (int64_t i = 0; i < width; ++i) put(own + i, fast_exp(get(own + i) - highest) * share);
        put(own + targets[row], (fast_exp(target - highest) / sum - 1.0f) * scale);
    }
}

// A small matrix into places of a larger one's memory; a number's place is the sum of its row's and its column's.
template <class T>
void place(const float *values, const int64_t *row_places, const int64_t *column_places, T *memory, int64_t rows,
           int64_t columns) {
    ROWS(int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < columns; ++i)
            put(memory + row_places[row] + column_places[i], values[row * columns + i]);
    }
}

}  // namespace
