// Small matrix products, in tiles whose sums stay in registers.
//
// A product runs in steps over words of 32 bits: one fp32 number, or two bf16 numbers that stand next to each other in
// the direction of the sum. The left matrix is read where it lies, the right one from panels: of COLUMNS columns, word
// by word.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "numbers.h"

namespace {

// As wide as the processor's registers, and as many sums as leave some of them free.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 6;
#else
constexpr int LANES = 4, TILE = 6;
#endif
constexpr int COLUMNS = 2 * LANES;

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

template <class T>
struct Word;

template <>
struct Word<float> {
    typedef float type;
    static constexpr int64_t NUMBERS = 1;
    static type of(const float *numbers, int64_t) { return numbers[0]; }
    static type alone(const float *number) { return number[0]; }
    static type rounded(const float *numbers, int64_t) { return numbers[0]; }

    static floats add(floats sum, const type *left, const type *right) {
        return sum + *left * *reinterpret_cast<const floats *>(right);
    }
};

template <>
struct Word<bf16> {
    typedef uint32_t type;
    static constexpr int64_t NUMBERS = 2;
    // Two numbers, the second one so far behind the first.
    static type of(const bf16 *numbers, int64_t step) {
        return static_cast<uint32_t>(numbers[0].bits) | static_cast<uint32_t>(numbers[step].bits) << 16;
    }

    static type alone(const bf16 *number) { return number->bits; }
    // The same of fp32 numbers.
    static type rounded(const float *numbers, int64_t step) {
        bf16 both[2];
        put(both, numbers[0]);
        put(both + 1, numbers[step]);
        return of(both, 1);
    }

    static floats add(floats sum, const type *left, const type *right) {
#ifdef __AVX512BF16__
        return reinterpret_cast<floats>(
            _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(_mm512_set1_epi32(*left)),
                             reinterpret_cast<__m512bh>(_mm512_loadu_si512(right))));
#else
        const words both = *reinterpret_cast<const words *>(right);
        const uint32_t first = *left << 16, second = *left & 0xffff0000u;
        float one, two;
        std::memcpy(&one, &first, 4);
        std::memcpy(&two, &second, 4);
        return sum + one * reinterpret_cast<floats>(both << 16) + two * reinterpret_cast<floats>(both & 0xffff0000u);
#endif
    }
};

template <class N>
struct Buffer : std::unique_ptr<N[]> {
    explicit Buffer(int64_t count) : std::unique_ptr<N[]>(new N[static_cast<size_t>(count)]) {}
};

// How many of a size hold a count.
inline int64_t up(int64_t count, int64_t size) { return (count + size - 1) / size; }

// sums[HEIGHT][COLUMNS] (+)= left · panel. `left` are the rows' first words; a row's next word is `stride` bytes behind.
// A function of its own, since inlined the compiler keeps some of the sums in memory.
template <class T, bool ADDS, int HEIGHT>
__attribute__((noinline)) void tile(const typename Word<T>::type *const *left, int64_t stride,
                                    const typename Word<T>::type *panel, int64_t steps, float *sums,
                                    int64_t sums_stride) {
    typedef typename Word<T>::type word;
    floats sum[HEIGHT][2] = {};
    int64_t at = 0;
    for (const word *right = panel, *end = panel + steps * COLUMNS; right < end; right += COLUMNS, at += stride) {
#pragma GCC unroll 16
        for (int i = 0; i < HEIGHT; ++i) {
            const word *own = reinterpret_cast<const word *>(reinterpret_cast<const char *>(left[i]) + at);
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) sum[i][j] = Word<T>::add(sum[i][j], own, right + j * LANES);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < HEIGHT; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            floats *to = reinterpret_cast<floats *>(sums + i * sums_stride + j * LANES);
            *to = ADDS ? *to + sum[i][j] : sum[i][j];
        }
    }
}

// Panels of a right matrix whose columns are given: `width` numbers each, along which the sum runs. Space for
// ``up(count, COLUMNS) * COLUMNS * up(width, NUMBERS)`` words; 0 beyond the last column.
template <class T, class Column>
void pack_columns(int64_t count, int64_t width, Column column, typename Word<T>::type *panels) {
    const int64_t steps = width / Word<T>::NUMBERS;
    for (int64_t from = 0; from < count; from += COLUMNS, panels += steps * COLUMNS) {
        for (int64_t j = 0; j < COLUMNS; ++j) {
            if (from + j >= count) {
                for (int64_t step = 0; step < steps; ++step) panels[step * COLUMNS + j] = 0;
                continue;
            }
            const T *own = column(from + j);
            for (int64_t step = 0; step < steps; ++step)
                panels[step * COLUMNS + j] = Word<T>::of(own + step * Word<T>::NUMBERS, 1);
        }
    }
}

// Panels of a right matrix whose rows are given: `width` numbers each, the sum runs from row to row. Space for
// ``up(width, COLUMNS) * COLUMNS * up(count, NUMBERS)`` words; 0 beyond the last row and column.
template <class T, class Row>
void pack_rows(int64_t count, int64_t width, Row row, typename Word<T>::type *panels) {
    const int64_t steps = up(count, Word<T>::NUMBERS);
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t at = step * Word<T>::NUMBERS, last = at + Word<T>::NUMBERS - 1;
        const T *first = row(at);
        const int64_t apart = last < count ? row(last) - first : 0;
        for (int64_t from = 0; from < width; from += COLUMNS) {
            typename Word<T>::type *to = panels + (from * steps + step * COLUMNS);
            const int64_t here = width - from < COLUMNS ? width - from : COLUMNS;
            if (last < count) {
                EACH (int64_t j = 0; j < here; ++j) to[j] = Word<T>::of(first + from + j, apart);
            } else {
                EACH (int64_t j = 0; j < here; ++j) to[j] = Word<T>::alone(first + from + j);
            }
            for (int64_t j = here; j < COLUMNS; ++j) to[j] = 0;
        }
    }
}

}  // namespace
