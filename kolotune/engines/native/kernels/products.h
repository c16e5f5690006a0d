// Small matrix products, in tiles whose sums stay in registers.
//
// A product runs in steps over words of 32 bits: one fp32 number, or two bf16 numbers that stand next to each other in
// the direction of the sum. The left matrix is read where it lies, the right one from panels: of COLUMNS columns, word
// by word.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#ifdef __AVX2__
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

// How many of a size hold a count.
inline int64_t up(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Memory that begins with a line of the cache: a register that is read across two lines takes twice as long.
constexpr int64_t LINE = 64;

// From C's library, so that C++'s own need not be linked. Where there is no memory, the process ends: nobody could be
// given an error from inside a thread.
inline void *line_memory(int64_t bytes) {
    void *memory = std::aligned_alloc(LINE, static_cast<size_t>(up(bytes > 0 ? bytes : 1, LINE) * LINE));
    if (memory == nullptr) std::abort();
    return memory;
}

struct Free {
    void operator()(void *memory) const { std::free(memory); }
};

template <class N>
struct Buffer : std::unique_ptr<N[], Free> {
    explicit Buffer(int64_t count)
        : std::unique_ptr<N[], Free>(static_cast<N *>(line_memory(count * static_cast<int64_t>(sizeof(N))))) {}
};

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

constexpr int TURNED = 8;

// A number as a word of a panel: a word itself, or fp32 of a bf16.
inline float as_word(float word) { return word; }
inline uint32_t as_word(uint32_t word) { return word; }
inline float as_word(bf16 number) { return get(&number); }

#ifdef __AVX2__
inline __m256 eight_words(const float *at) { return _mm256_loadu_ps(at); }
inline __m256 eight_words(const uint32_t *at) { return _mm256_loadu_ps(reinterpret_cast<const float *>(at)); }
inline __m256 eight_words(const bf16 *at) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
#endif

// A square of TURNED words of as many columns, from `step` on, row by row into a panel.
template <class N, class W>
void turn_square(const N *const *columns, int64_t step, W *to) {
#ifdef __AVX2__
    __m256 in[TURNED], pairs[TURNED], fours[TURNED];
#pragma GCC unroll 8
    for (int i = 0; i < TURNED; ++i) in[i] = eight_words(columns[i] + step);
#pragma GCC unroll 4
    for (int i = 0; i < TURNED; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < TURNED; i += 4) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < TURNED / 2; ++i) {
        float *low = reinterpret_cast<float *>(to + i * COLUMNS), *high = low + TURNED / 2 * COLUMNS;
        _mm256_storeu_ps(low, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
        _mm256_storeu_ps(high, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
    }
#else
    for (int j = 0; j < TURNED; ++j) {
        for (int i = 0; i < TURNED; ++i) to[i * COLUMNS + j] = as_word(columns[j][step + i]);
    }
#endif
}

// One panel of `count` columns, at most COLUMNS. A few words of each column at a time, so that what is read and written
// stays in the nearest cache.
template <class N, class W>
void turn_panel(const N *const *columns, int64_t count, int64_t steps, W *panel) {
    for (int64_t step = 0; step < steps; step += TURNED) {
        const int64_t some = steps - step < TURNED ? steps - step : TURNED;
        int64_t j = 0;
        if (some == TURNED) {
            for (; j + TURNED <= count; j += TURNED) turn_square(columns + j, step, panel + step * COLUMNS + j);
        }
        for (; j < count; ++j) {
            for (int64_t i = step; i < step + some; ++i) panel[i * COLUMNS + j] = as_word(columns[j][i]);
        }
        for (; j < COLUMNS; ++j) {
            for (int64_t i = step; i < step + some; ++i) panel[i * COLUMNS + j] = 0;
        }
    }
}

// Panels of a right matrix whose columns are given: `width` numbers each, along which the sum runs. Space for
// ``up(count, COLUMNS) * COLUMNS * up(width, NUMBERS)`` words; 0 beyond the last column.
template <class T, class Column>
void pack_columns(int64_t count, int64_t width, Column column, typename Word<T>::type *panels) {
    const int64_t steps = width / Word<T>::NUMBERS;
    for (int64_t from = 0; from < count; from += COLUMNS, panels += steps * COLUMNS) {
        const typename Word<T>::type *own[COLUMNS];
        const int64_t here = count - from < COLUMNS ? count - from : COLUMNS;
        for (int64_t j = 0; j < here; ++j)
            own[j] = reinterpret_cast<const typename Word<T>::type *>(column(from + j));
        turn_panel(own, here, steps, panels);
    }
}

// Panels of a right matrix whose rows are given: `width` numbers each, the sum runs from row to row. Space for
// ``up(width, COLUMNS) * COLUMNS * up(count, NUMBERS)`` words; 0 beyond the last row and column. Rows that will be read
// are fetched ahead: they lie apart, so the processor doesn't foresee them.
template <class T, class Row>
void pack_rows(int64_t count, int64_t width, Row row, typename Word<T>::type *panels) {
    constexpr int64_t NUMBERS = Word<T>::NUMBERS, AHEAD = 12 * NUMBERS;
    const int64_t steps = up(count, NUMBERS);
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t at = step * NUMBERS, last = at + NUMBERS - 1;
        const T *first = row(at), *ahead = at + AHEAD < count ? row(at + AHEAD) : first;
        const int64_t apart = last < count ? row(last) - first : 0;
        typename Word<T>::type *to = panels + step * COLUMNS;
        for (int64_t from = 0; from < width; from += COLUMNS, to += steps * COLUMNS) {
            const int64_t here = width - from < COLUMNS ? width - from : COLUMNS;
            for (int64_t j = 0; j < here; j += 16) __builtin_prefetch(ahead + from + j);
            if (last < count && here == COLUMNS) {  // the compiler knows the number of columns
                EACH (int64_t j = 0; j < COLUMNS; ++j) to[j] = Word<T>::of(first + from + j, apart);
            } else if (last < count) {
                EACH (int64_t j = 0; j < here; ++j) to[j] = Word<T>::of(first + from + j, apart);
            } else {
                EACH (int64_t j = 0; j < here; ++j) to[j] = Word<T>::alone(first + from + j);
            }
            for (int64_t j = here; j < COLUMNS; ++j) to[j] = 0;
        }
    }
}

}  // namespace
