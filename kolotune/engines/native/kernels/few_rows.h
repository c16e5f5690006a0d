// Products of a few rows with a whole frozen matrix, fp32, as fast as the matrix is read: it is not packed.

#pragma once

#include <type_traits>

#include "numbers.h"
#include "products.h"
#include "threads.h"

namespace {

constexpr int64_t FEW_ROWS = 8, OUTPUTS_AT_ONCE = 16;

#ifdef __AVX2__
inline __m256 eight(const float *at) { return _mm256_loadu_ps(at); }
inline __m256 eight(const bf16 *at) { return eight_words(at); }

inline float sum_of(__m256 lanes) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// out[ROWS] += x · row, along `width` numbers.
template <class T, int ROWS>
void dot_rows(const T *row, const float *x, int64_t x_stride, int64_t width, float *out) {
    __m256 sums[ROWS] = {};
    int64_t at = 0;
    for (; at + 8 <= width; at += 8) {
        const __m256 weights = eight(row + at);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) sums[i] = _mm256_fmadd_ps(weights, eight(x + i * x_stride + at), sums[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
        float sum = sum_of(sums[i]);
        for (int64_t rest = at; rest < width; ++rest) sum += get(row + rest) * x[i * x_stride + rest];
        out[i] += sum;
    }
}
#else
template <class T, int ROWS>
void dot_rows(const T *row, const float *x, int64_t x_stride, int64_t width, float *out) {
    for (int i = 0; i < ROWS; ++i) {
        float sum = 0;
        for (int64_t at = 0; at < width; ++at) sum += get(row + at) * x[i * x_stride + at];
        out[i] += sum;
    }
}
#endif

// out = x · matrixᵀ for ROWS rows; some outputs at a time are a thread's task.
template <int ROWS, class M>
void multiply_few(const M &m, const float *x, int64_t x_stride, float *out) {
    Tasks tasks;
    in_threads([=, &tasks] {
        for (int64_t task; (task = tasks.take(up(m.outputs, OUTPUTS_AT_ONCE))) >= 0;) {
            const int64_t end = task * OUTPUTS_AT_ONCE + OUTPUTS_AT_ONCE;
            for (int64_t at = task * OUTPUTS_AT_ONCE; at < end && at < m.outputs; ++at) {
                float sums[ROWS] = {};
                dot_rows<std::remove_cv_t<std::remove_pointer_t<decltype(m.frozen)>>, ROWS>(
                    m.frozen + at * m.inputs, x, x_stride, m.inputs, sums);
                if (m.rank) dot_rows<float, ROWS>(m.changing + at * m.rank, x + m.inputs, x_stride, m.rank, sums);
                for (int i = 0; i < ROWS; ++i) out[i * m.outputs + at] = sums[i];
            }
        }
    });
}

template <class M>
void multiply_few(const M &m, const float *x, int64_t x_stride, float *out, int64_t rows) {
    switch (rows) {
        case 1: return multiply_few<1>(m, x, x_stride, out);
        case 2: return multiply_few<2>(m, x, x_stride, out);
        case 3: return multiply_few<3>(m, x, x_stride, out);
        case 4: return multiply_few<4>(m, x, x_stride, out);
        case 5: return multiply_few<5>(m, x, x_stride, out);
        case 6: return multiply_few<6>(m, x, x_stride, out);
        case 7: return multiply_few<7>(m, x, x_stride, out);
        case 8: return multiply_few<8>(m, x, x_stride, out);
    }
}

}  // namespace
