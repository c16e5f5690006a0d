// Products of rows with the frozen matrices of experts and their adapters, fp32.
//
// The rows of each expert follow each other; an index says where they lie, so that they need not be gathered. Pieces of
// the experts' matrices are the tasks of the threads, which wait for each other once a call and not once an expert. A
// number of the result is summed in the same order however the work is split.
//
// For processors with AVX2 and nothing wider, as `matrices.h`.

#pragma once

#include <algorithm>

#include "adapters.h"
#include "matrices.h"
#include "threads.h"

namespace {

// A weight of all experts: frozen ``[experts, outputs, inputs]``, in bf16 where that is exact, and the adapters'
// A ``[experts, rank, inputs]`` and B ``[experts, outputs, rank]``, whose product counts `scale` times.
template <class T>
struct ExpertWeight {
    const T *frozen;
    const float *a, *b;
    int64_t experts, outputs, inputs, rank;
    float scale;
};

// Rows in the order of their experts: those that `index` names, or all.
struct Rows {
    const float *numbers;
    const int64_t *index;
    int64_t stride;

    const float *row(int64_t at) const { return numbers + (index == nullptr ? at : index[at]) * stride; }
};

// Some columns of one expert's matrix, or some of its rows.
struct Piece {
    int64_t expert, from, count;
};

// Columns of a matrix that a thread computes at once, and rows of which it computes the adapters' thin products.
constexpr int64_t COLUMNS_OF_PIECE = 6 * COLUMNS, ROWS_OF_PIECE = 16 * TILE;

struct Pieces {
    Buffer<Piece> all;
    int64_t count = 0;

    explicit Pieces(int64_t most) : all(most) {}
    void add(int64_t expert, int64_t from, int64_t size) { all[count++] = {expert, from, size}; }
};

// Some columns at a time of the experts that have rows.
inline Pieces pieces_of(const int64_t *starts, int64_t experts, int64_t columns) {
    Pieces pieces(experts * up(columns, COLUMNS_OF_PIECE));
    for (int64_t expert = 0; expert < experts; ++expert) {
        if (starts[expert] == starts[expert + 1]) continue;
        for (int64_t from = 0; from < columns; from += COLUMNS_OF_PIECE)
            pieces.add(expert, from, std::min(columns - from, COLUMNS_OF_PIECE));
    }
    return pieces;
}

// Some rows at a time.
inline Pieces row_pieces_of(const int64_t *starts, int64_t experts) {
    Pieces pieces(experts + up(starts[experts], ROWS_OF_PIECE));
    for (int64_t expert = 0; expert < experts; ++expert) {
        for (int64_t from = starts[expert]; from < starts[expert + 1]; from += ROWS_OF_PIECE)
            pieces.add(expert, from, std::min(starts[expert + 1] - from, ROWS_OF_PIECE));
    }
    return pieces;
}

// Panels of `count` columns from `from` on of a matrix whose rows are given, of which `steps` from `first` on.
template <class T>
void widen_rows(const T *matrix, int64_t stride, int64_t first, int64_t steps, int64_t from, int64_t count,
                float *panels) {
    constexpr int64_t AHEAD = 12, NUMBERS = 64 / sizeof(T);
    const int64_t whole = count / COLUMNS * COLUMNS;
    for (int64_t step = 0; step < steps; ++step) {
        const T *row = matrix + (first + step) * stride + from;
        float *to = panels + step * COLUMNS;
        if (step + AHEAD < steps) {
            for (int64_t j = 0; j < count; j += NUMBERS) __builtin_prefetch(row + AHEAD * stride + j);
        }
        for (int64_t j = 0; j < whole; j += COLUMNS, to += steps * COLUMNS) {
            EACH (int64_t i = 0; i < COLUMNS; ++i) to[i] = get(row + j + i);
        }
        if (whole < count) {
            for (int64_t i = 0; i < COLUMNS; ++i) to[i] = whole + i < count ? get(row + whole + i) : 0.0f;
        }
    }
}

// Panels of `count` columns from `from` on of a matrix whose columns are given, of which `steps` from `first` on.
template <class T>
void widen_columns(const T *matrix, int64_t stride, int64_t first, int64_t steps, int64_t from, int64_t count,
                   float *panels) {
    for (int64_t at = 0; at < count; at += COLUMNS, panels += steps * COLUMNS) {
        const T *columns[COLUMNS];
        const int64_t here = std::min<int64_t>(count - at, COLUMNS);
        for (int64_t j = 0; j < here; ++j) columns[j] = matrix + (from + at + j) * stride + first;
        turn_panel(columns, here, steps, panels);
    }
}

// out[rows][count] (+)= left · right, where a sum has `width` numbers; `pack(first, steps, panels)` packs some of the
// right matrix.
template <class Left, class Pack>
void multiply_piece(Left left, int64_t rows, int64_t width, int64_t count, bool adds, float *out, int64_t out_stride,
                    Pack pack, float *panels) {
    const int64_t at_once = width ? up(width, up(width, STEPS_AT_ONCE)) : 0;
    for (int64_t first = 0; first < width; first += at_once) {
        const int64_t steps = std::min(width - first, at_once);
        pack(first, steps, panels);
        multiply_panels([&](int64_t row) { return left(row) + first; }, rows, panels, steps, count, adds || first, out,
                        out_stride);
    }
}

// The adapters' thin products of all rows: thin[rows][rank] = scale · left[rows][width] · right; `pack` as above, of
// some columns of an expert's.
template <class Pack>
void lower_rows(Tasks *tasks, const Pieces &pieces, const Rows &left, int64_t width, int64_t rank, float scale,
                float *thin, Pack pack, float *panels) {
    for (int64_t at; (at = tasks->take(pieces.count)) >= 0;) {
        const Piece piece = pieces.all[at];
        float *to = thin + piece.from * rank;
        for (int64_t column = 0; column < rank; column += COLUMNS_OF_PIECE) {
            const int64_t count = std::min(rank - column, COLUMNS_OF_PIECE);
            multiply_piece([&](int64_t row) { return left.row(piece.from + row); }, piece.count, width, count, false,
                           to + column, rank,
                           [&](int64_t first, int64_t steps, float *into) {
                               pack(piece.expert, first, steps, column, count, into);
                           },
                           panels);
        }
        EACH (int64_t i = 0; i < piece.count * rank; ++i) to[i] *= scale;
    }
    GOMP_barrier();  // what follows multiplies by the thin products of all threads
}

// low = scale · x · Aᵀ and out = x · Wᵀ + low · Bᵀ.
template <class T>
void experts_forward(const ExpertWeight<T> *weight, const int64_t *starts, const Rows *x, float *low, float *out) {
    const ExpertWeight<T> w = *weight;
    const Rows left = *x;
    const Pieces pieces = pieces_of(starts, w.experts, w.outputs);
    const Pieces thin = row_pieces_of(starts, w.rank ? w.experts : 0);
    Tasks thin_tasks, tasks;
    in_threads([=, &pieces, &thin, &thin_tasks, &tasks] {
        Buffer<float> panels(COLUMNS_OF_PIECE * STEPS_AT_ONCE);
        lower_rows(&thin_tasks, thin, left, w.inputs, w.rank, w.scale, low,
                   [&](int64_t expert, int64_t first, int64_t steps, int64_t from, int64_t count, float *into) {
                       widen_columns(w.a + expert * w.rank * w.inputs, w.inputs, first, steps, from, count, into);
                   },
                   panels.get());
        for (int64_t at; (at = tasks.take(pieces.count)) >= 0;) {
            const Piece piece = pieces.all[at];
            const int64_t start = starts[piece.expert], rows = starts[piece.expert + 1] - start;
            const T *matrix = w.frozen + piece.expert * w.outputs * w.inputs;
            float *to = out + start * w.outputs + piece.from;
            multiply_piece([&](int64_t row) { return left.row(start + row); }, rows, w.inputs, piece.count, false, to,
                           w.outputs,
                           [&](int64_t first, int64_t steps, float *into) {
                               widen_columns(matrix, w.inputs, first, steps, piece.from, piece.count, into);
                           },
                           panels.get());
            const float *b = w.b + piece.expert * w.outputs * w.rank;
            multiply_piece([&](int64_t row) { return low + (start + row) * w.rank; }, rows, w.rank, piece.count, true,
                           to, w.outputs,
                           [&](int64_t first, int64_t steps, float *into) {
                               widen_columns(b, w.rank, first, steps, piece.from, piece.count, into);
                           },
                           panels.get());
        }
    });
}

// d_low = scale · d_out · B and d_x = d_out · W + d_low · A.
template <class T>
void experts_backward(const ExpertWeight<T> *weight, const int64_t *starts, const Rows *d_out, float *d_low,
                      float *d_x) {
    const ExpertWeight<T> w = *weight;
    const Rows left = *d_out;
    const Pieces pieces = pieces_of(starts, w.experts, w.inputs);
    const Pieces thin = row_pieces_of(starts, w.rank ? w.experts : 0);
    Tasks thin_tasks, tasks;
    in_threads([=, &pieces, &thin, &thin_tasks, &tasks] {
        Buffer<float> panels(COLUMNS_OF_PIECE * STEPS_AT_ONCE);
        lower_rows(&thin_tasks, thin, left, w.outputs, w.rank, w.scale, d_low,
                   [&](int64_t expert, int64_t first, int64_t steps, int64_t from, int64_t count, float *into) {
                       widen_rows(w.b + expert * w.outputs * w.rank, w.rank, first, steps, from, count, into);
                   },
                   panels.get());
        for (int64_t at; (at = tasks.take(pieces.count)) >= 0;) {
            const Piece piece = pieces.all[at];
            const int64_t start = starts[piece.expert], rows = starts[piece.expert + 1] - start;
            const T *matrix = w.frozen + piece.expert * w.outputs * w.inputs;
            float *to = d_x + start * w.inputs + piece.from;
            multiply_piece([&](int64_t row) { return left.row(start + row); }, rows, w.outputs, piece.count, false, to,
                           w.inputs,
                           [&](int64_t first, int64_t steps, float *into) {
                               widen_rows(matrix, w.inputs, first, steps, piece.from, piece.count, into);
                           },
                           panels.get());
            const float *a = w.a + piece.expert * w.rank * w.inputs;
            multiply_piece([&](int64_t row) { return d_low + (start + row) * w.rank; }, rows, w.rank, piece.count, true,
                           to, w.inputs,
                           [&](int64_t first, int64_t steps, float *into) {
                               widen_rows(a, w.inputs, first, steps, piece.from, piece.count, into);
                           },
                           panels.get());
        }
    });
}

// gradient[experts][rank][width] += thinᵀ · wide of each expert's rows, with ``thin [rows, rank]`` and ``wide [rows,
// width]``; or, transposed, gradient[experts][width][rank].
inline void experts_gradient_of(const int64_t *starts, int64_t experts, const float *thin, int64_t rank,
                                const Rows *wide, int64_t width, float *gradient, int64_t transposed) {
    constexpr int64_t AT_ONCE = 32;  // rows whose panels stay in the nearest cache
    const Rows right = *wide;
    const Pieces pieces = pieces_of(starts, experts, width);
    const int64_t height = up(rank, THIN) * THIN;
    Tasks tasks;
    in_threads([=, &pieces, &tasks] {
        Buffer<float> panels(AT_ONCE * COLUMNS_OF_PIECE), sums(height * COLUMNS_OF_PIECE);
        for (int64_t at; (at = tasks.take(pieces.count)) >= 0;) {
            const Piece piece = pieces.all[at];
            std::fill_n(sums.get(), height * COLUMNS_OF_PIECE, 0.0f);
            const int64_t end = starts[piece.expert + 1];
            for (int64_t row = starts[piece.expert]; row < end; row += AT_ONCE) {
                const int64_t some = std::min(end - row, AT_ONCE);
                pack_rows<float>(some, piece.count, [&](int64_t i) { return right.row(row + i) + piece.from; },
                                 panels.get());
                for (int64_t i = 0; i < height; i += THIN) {
                    const float *left[THIN];
                    for (int64_t j = 0; j < THIN; ++j) left[j] = thin + row * rank + std::min(i + j, rank - 1);
                    for (int64_t from = 0; from < piece.count; from += COLUMNS)
                        tile<float, true, THIN>(left, rank * sizeof(float), panels.get() + from * some, some,
                                                sums.get() + i * COLUMNS_OF_PIECE + from, COLUMNS_OF_PIECE);
                }
            }
            float *own = gradient + piece.expert * rank * width;
            if (transposed) {
                for (int64_t j = 0; j < piece.count; ++j) {
                    float *to = own + (piece.from + j) * rank;
                    for (int64_t i = 0; i < rank; ++i) to[i] += sums[i * COLUMNS_OF_PIECE + j];
                }
            } else {
                for (int64_t i = 0; i < rank; ++i) {
                    float *to = own + i * width + piece.from;
                    const float *from = sums.get() + i * COLUMNS_OF_PIECE;
                    EACH (int64_t j = 0; j < piece.count; ++j) to[j] += from[j];
                }
            }
        }
    });
}

}  // namespace
