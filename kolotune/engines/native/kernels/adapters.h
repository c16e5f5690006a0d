// The products of adapters: thin matrices against a row of tokens.

#pragma once

#include "numbers.h"
#include "products.h"
#include "threads.h"

namespace {

// Tiles of these have no more rows than most adapters' ranks divide by, and no more sums than there are registers.
constexpr int THIN = TILE < 8 ? 4 : 8;

// out[tokens][rank] = x[tokens][width] · down[rank][width]ᵀ; the width is a whole number of words.
template <class T>
void lower(const T *x, int64_t x_stride, const T *down, T *out, int64_t out_stride, int64_t tokens, int64_t width,
           int64_t rank) {
    typedef typename Word<T>::type word;
    const int64_t steps = width / Word<T>::NUMBERS, columns = up(rank, COLUMNS) * COLUMNS;
    Buffer<word> panels(steps * columns);
    pack_columns<T>(rank, width, [&](int64_t at) { return down + at * width; }, panels.get());
    in_threads([=, &panels] {
        Buffer<float> sums(TILE * columns);
        const Share share(up(tokens, TILE));
        for (int64_t token = share.first * TILE; token < tokens && token < share.last * TILE; token += TILE) {
            const word *left[TILE];
            for (int64_t i = 0; i < TILE; ++i) {
                const int64_t own = token + i < tokens ? token + i : tokens - 1;
                left[i] = reinterpret_cast<const word *>(x + own * x_stride);
            }
            for (int64_t from = 0; from < columns; from += COLUMNS)
                tile<T, false, TILE>(left, sizeof(word), panels.get() + from * steps, steps, sums.get() + from, columns);
            for (int64_t i = 0; i < TILE && token + i < tokens; ++i) {
                T *to = out + (token + i) * out_stride;
                for (int64_t r = 0; r < rank; ++r) put(to + r, sums[i * columns + r]);
            }
        }
    });
}

// A row of tokens' numbers, ``[tokens, width]``, and what of a gradient they are multiplied into.
template <class T>
struct Side {
    const T *numbers;
    int64_t stride, width;

    const T *row(int64_t token) const { return numbers + token * stride; }
};

// gradient += factor · thinᵀ · wide, ``[thin, wide]``, or transposed.
template <class T>
void add_product(const Side<T> *thin_side, const Side<T> *wide_side, int64_t tokens, float *gradient, float factor,
                 int64_t transposed) {
    typedef typename Word<T>::type word;
    constexpr int64_t WIDE = 6 * COLUMNS, AT_ONCE = 32 * Word<T>::NUMBERS;  // a panel stays in the nearest cache
    const Side<T> thin = *thin_side, wide = *wide_side;
    const int64_t steps = up(tokens, Word<T>::NUMBERS), height = up(thin.width, THIN) * THIN;
    Buffer<word> left(steps * height);
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t token = step * Word<T>::NUMBERS;
        const bool alone = token + Word<T>::NUMBERS > tokens;
        word *to = left.get() + step * height;
        for (int64_t i = 0; i < thin.width; ++i)
            to[i] = alone ? Word<T>::alone(thin.row(token) + i) : Word<T>::of(thin.row(token) + i, thin.stride);
        for (int64_t i = thin.width; i < height; ++i) to[i] = 0;
    }
    in_threads([=, &left] {
        Buffer<word> panels(AT_ONCE / Word<T>::NUMBERS * WIDE);
        Buffer<float> sums(height * WIDE);
        const Share share(up(wide.width, WIDE));
        for (int64_t column = share.first * WIDE; column < wide.width && column < share.last * WIDE; column += WIDE) {
            const int64_t columns = wide.width - column < WIDE ? wide.width - column : WIDE;
            std::memset(sums.get(), 0, static_cast<size_t>(height * WIDE) * sizeof(float));
            for (int64_t token = 0; token < tokens; token += AT_ONCE) {
                const int64_t count = tokens - token < AT_ONCE ? tokens - token : AT_ONCE;
                const int64_t some = up(count, Word<T>::NUMBERS);
                pack_rows<T>(count, columns, [&](int64_t at) { return wide.row(token + at) + column; }, panels.get());
                for (int64_t i = 0; i < height; i += THIN) {
                    const word *rows[THIN];
                    for (int64_t j = 0; j < THIN; ++j) rows[j] = left.get() + token / Word<T>::NUMBERS * height + i + j;
                    for (int64_t from = 0; from < columns; from += COLUMNS)
                        tile<T, true, THIN>(rows, height * sizeof(word), panels.get() + from * some, some,
                                            sums.get() + i * WIDE + from, WIDE);
                }
            }
            for (int64_t i = 0; i < thin.width; ++i) {
                const float *own = sums.get() + i * WIDE;
                if (transposed) {
                    for (int64_t j = 0; j < columns; ++j) gradient[(column + j) * thin.width + i] += own[j] * factor;
                } else {
                    EACH (int64_t j = 0; j < columns; ++j) gradient[i * wide.width + column + j] += own[j] * factor;
                }
            }
        }
    });
}

}  // namespace
