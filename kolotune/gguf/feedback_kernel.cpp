// Rounds some columns of a matrix to ggml's blocks, with each column's error made good by the columns still to come; as
// `block_rounding.py` does without a compiler. Rows have nothing to do with each other: any may be rounded at a time, and
// what becomes of one does not depend on which others there are.
//
// Arrays are by columns, each of them of all rows, in the order of rounding: the last one is rounded first.

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int64_t ROWS = 32, PARTS = ROWS / LANES, WIDEST = 256, MOST_COLUMNS = 256, LARGEST_BLOCK = 512;

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// ggml's own: blocks of rows of weights, with the importance of each column, and the values of blocks.
typedef size_t (*Quantize)(int type, const float *weights, void *blocks, int64_t start, int64_t rows, int64_t columns,
                           const float *importance);
typedef void (*Widen)(const void *blocks, float *values, int64_t count);

// How a type's blocks are rounded. `keeps` has the bits that are no quants, `patterns` the quants' bits of blocks that
// have one quant everywhere: the first and the last one where levels are at equal distances, else each.
struct Type {
    Quantize quantize;
    Widen widen;
    const uint8_t *keeps, *patterns;
    int64_t number, width, size, levels, is_linear;
};

// Columns to round: `count` of them, whole blocks, of `rows` rows. `factor` is ``[count, count]`` with the columns
// behind a column in its row, `places` says which column of the matrix each of them is. `blocks` and `quants` are those
// of the whole matrix, ``[blocks, rows, bytes]`` and ``[blocks, rows, width]``.
struct Columns {
    const float *weights, *wanted, *factor, *importance;
    const int64_t *places;
    float *errors;
    uint8_t *blocks, *quants;
    int64_t count, rows;
};

namespace {

// Some rows, whose columns stand side by side.
struct Strip {
    float weights[WIDEST][ROWS], errors[MOST_COLUMNS][ROWS];
    float natural[ROWS * WIDEST];
    float levels[ROWS * WIDEST], last_levels[ROWS * WIDEST];
    uint8_t blocks[ROWS * LARGEST_BLOCK];
};

// Add to a column the errors of the columns from `first` to `last`.
void add_errors(float *column, const float *factors, const float (*errors)[ROWS], int64_t first, int64_t last) {
    floats sums[PARTS];
#pragma GCC unroll 8
    for (int part = 0; part < PARTS; ++part) sums[part] = *reinterpret_cast<const floats *>(column + part * LANES);
    for (int64_t behind = first; behind < last; ++behind) {
        const float factor = factors[behind];
#pragma GCC unroll 8
        for (int part = 0; part < PARTS; ++part)
            sums[part] += factor * *reinterpret_cast<const floats *>(errors[behind] + part * LANES);
    }
#pragma GCC unroll 8
    for (int part = 0; part < PARTS; ++part) *reinterpret_cast<floats *>(column + part * LANES) = sums[part];
}

// The values of the blocks if each had the quants of a pattern.
void widen_pattern(const Type &type, const uint8_t *blocks, int64_t pattern, int64_t rows, Strip &strip, float *values) {
    const uint8_t *bits = type.patterns + pattern * type.size;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t at = 0; at < type.size; ++at)
            strip.blocks[row * type.size + at] = (blocks[row * type.size + at] & type.keeps[at]) | bits[at];
    }
    type.widen(strip.blocks, values, rows * type.width);
}

// Levels at equal distances: between the first and the last.
struct Linear {
    const Type &type;
    const Strip &strip;

    void round(int64_t place, const float *weights, float *values, uint8_t *quants) const {
        const float last = type.levels - 1;
        float lowest[ROWS], steps[ROWS];
        for (int64_t row = 0; row < ROWS; ++row) {
            lowest[row] = strip.levels[row * type.width + place];
            steps[row] = (strip.last_levels[row * type.width + place] - lowest[row]) / last;
        }
        for (int64_t row = 0; row < ROWS; ++row) {
            const float inverse = steps[row] == 0 ? 0.0f : 1 / steps[row];
            float quant = __builtin_rintf(weights[row] * inverse - lowest[row] * inverse);
            quant = quant < 0 ? 0 : quant;
            quant = quant > last ? last : quant;
            quants[row] = static_cast<uint8_t>(quant);
            values[row] = lowest[row] + quant * steps[row];
        }
    }
};

// Any levels: the nearest one, of two the lower quant.
struct Nearest {
    const Type &type;
    const float *levels;  // [levels, ROWS * width]

    void round(int64_t place, const float *weights, float *values, uint8_t *quants) const {
        float best[ROWS];
        for (int64_t row = 0; row < ROWS; ++row) best[row] = __builtin_inff(), quants[row] = 0, values[row] = 0;
        for (int64_t quant = 0; quant < type.levels; ++quant) {
            const float *level = levels + quant * ROWS * type.width + place;
            for (int64_t row = 0; row < ROWS; ++row) {
                const float distance = __builtin_fabsf(level[row * type.width] - weights[row]);
                if (distance >= best[row]) continue;
                best[row] = distance, values[row] = level[row * type.width], quants[row] = quant;
            }
        }
    }
};

template <class Rounding>
void round_block(const Columns &columns, const Rounding &rounding, int64_t first, int64_t width, int64_t row,
                 int64_t rows, uint8_t *quants, Strip &strip) {
    for (int64_t column = first + width; column-- > first;) {
        float *weights = strip.weights[column - first], values[ROWS];
        uint8_t rounded[ROWS];
        add_errors(weights, columns.factor + column * columns.count, strip.errors, column + 1, first + width);
        const int64_t place = columns.places[column] % width;
        rounding.round(place, weights, values, rounded);
        for (int64_t each = 0; each < rows; ++each) {
            const float error = columns.wanted[column * columns.rows + row + each] - values[each];
            strip.errors[column][each] = columns.errors[column * columns.rows + row + each] = error;
            quants[each * width + place] = rounded[each];
        }
    }
}

void round_strip(const Type &type, const Columns &columns, int64_t row, int64_t rows, Strip &strip, float *levels) {
    const int64_t width = type.width;
    for (int64_t first = columns.count - width; first >= 0; first -= width) {
        const int64_t block = columns.places[first] / width;
        for (int64_t column = first; column < first + width; ++column) {
            float *weights = strip.weights[column - first];
            std::memcpy(weights, columns.weights + column * columns.rows + row, rows * sizeof(float));
            add_errors(weights, columns.factor + column * columns.count, strip.errors, first + width, columns.count);
            for (int64_t each = 0; each < rows; ++each)
                strip.natural[each * width + columns.places[column] % width] = weights[each];
        }
        uint8_t *blocks = columns.blocks + (block * columns.rows + row) * type.size;
        uint8_t *quants = columns.quants + (block * columns.rows + row) * width;
        type.quantize(type.number, strip.natural, blocks, 0, rows, width, columns.importance + block * width);
        if (type.is_linear) {
            widen_pattern(type, blocks, 0, rows, strip, strip.levels);
            widen_pattern(type, blocks, 1, rows, strip, strip.last_levels);
            round_block(columns, Linear{type, strip}, first, width, row, rows, quants, strip);
        } else {
            for (int64_t quant = 0; quant < type.levels; ++quant)
                widen_pattern(type, blocks, quant, rows, strip, levels + quant * ROWS * width);
            round_block(columns, Nearest{type, levels}, first, width, row, rows, quants, strip);
        }
    }
}

}  // namespace

// Round the columns of the rows from `first` to `last`. `memory` is zeroed, of `memory_needed` bytes.
extern "C" void round_columns(const Type *type, const Columns *columns, int64_t first, int64_t last, void *memory) {
    Strip &strip = *static_cast<Strip *>(memory);
    float *levels = reinterpret_cast<float *>(static_cast<Strip *>(memory) + 1);
    for (int64_t row = first; row < last; row += ROWS)
        round_strip(*type, *columns, row, last - row < ROWS ? last - row : ROWS, strip, levels);
}

extern "C" int64_t memory_needed(const Type *type) {
    return sizeof(Strip) + (type->is_linear ? 0 : type->levels * ROWS * type->width * sizeof(float));
}
