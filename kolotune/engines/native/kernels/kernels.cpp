// The elementwise parts of a training step, fused: each function reads its inputs once and writes its outputs once.
//
// Plain C++ without PyTorch's headers, so that it compiles in seconds; Python calls it through ctypes with the
// addresses of contiguous tensors (strides, in elements, where a row has room for more). Work is split by rows, and no
// sum crosses a row's border between threads, so results don't depend on the number of threads.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float get(const float *at) { return *at; }
inline void put(float *at, float value) { *at = value; }

inline float get(const bf16 *at) {
    uint32_t bits = static_cast<uint32_t>(at->bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Rounds to the nearest, ties to even; what is no number stays none.
inline void put(bf16 *at, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    at->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// exp within some 1e-7 of itself (Cephes' reduction, a polynomial of degree 6), in a form that compilers vectorize.
inline float fast_exp(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t power = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

#define ROWS _Pragma("omp parallel for schedule(static)") for
// Iterations don't depend on each other, which a compiler can't know of pointers.
#define EACH _Pragma("GCC ivdep") for

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

// Where the tokens of a packed row stand in the padded batch that attention sees. A beginning that all chats share is
// the batch's first row; its keys and values stand in front of every row's own ones.
struct Grid {
    const int64_t *source;   // [rows * width]: the token at a place, or -1 for padding
    const int64_t *lengths;  // [rows]
    int64_t rows, width, prefix;
    int64_t queries, keys, depth;  // heads, heads, width of one
    int64_t group() const { return queries / keys; }
    int64_t seen() const { return prefix + width; }
    // Row of the `[rows * keys, group * width, depth]` batch of queries (and of results) for a token's head.
    int64_t query_at(int64_t row, int64_t place, int64_t head) const {
        return ((row * keys + head / group()) * group() + head % group()) * width + place;
    }
    int64_t key_at(int64_t row, int64_t place, int64_t head) const { return (row * keys + head) * seen() + place; }
};

template <class T>
inline void turn(const T *from, T *to, const float *cosine, const float *sine, int64_t half, float direction) {
    EACH (int64_t i = 0; i < half; ++i) {
        float left = get(from + i), right = get(from + half + i), s = sine[i] * direction;
        put(to + i, left * cosine[i] - right * s);
        put(to + half + i, right * cosine[i] + left * s);
    }
}

// A packed row of queries, keys and values, turned by their positions, laid out for batched products.
template <class T>
void attention_inputs(const Grid *grid, const T *qkv, const float *cosine, const float *sine, T *queries, T *keys,
                      T *values) {
    const Grid g = *grid;
    const int64_t depth = g.depth, half = depth / 2, all = (g.queries + 2 * g.keys) * depth;
    ROWS(int64_t cell = 0; cell < g.rows * g.width; ++cell) {
        const int64_t row = cell / g.width, place = cell % g.width, token = g.source[cell];
        const size_t bytes = static_cast<size_t>(depth) * sizeof(T);
        for (int64_t head = 0; head < g.queries; ++head) {
            T *to = queries + g.query_at(row, place, head) * depth;
            if (token < 0)
                std::memset(static_cast<void *>(to), 0, bytes);
            else
                turn(qkv + token * all + head * depth, to, cosine + token * half, sine + token * half, half, 1.0f);
        }
        for (int64_t head = 0; head < g.keys; ++head) {
            const int64_t at = g.key_at(row, g.prefix + place, head) * depth;
            if (token < 0) {
                std::memset(static_cast<void *>(keys + at), 0, bytes);
                std::memset(static_cast<void *>(values + at), 0, bytes);
                continue;
            }
            const T *key = qkv + token * all + (g.queries + head) * depth, *value = key + g.keys * depth;
            turn(key, keys + at, cosine + token * half, sine + token * half, half, 1.0f);
            std::memcpy(static_cast<void *>(values + at), value, bytes);
            if (row != 0 || place >= g.prefix) continue;
            for (int64_t other = 0; other < g.rows; ++other) {
                const int64_t front = g.key_at(other, place, head) * depth;
                std::memcpy(static_cast<void *>(keys + front), keys + at, bytes);
                std::memcpy(static_cast<void *>(values + front), value, bytes);
            }
        }
    }
}

template <class T>
inline void add_to(float *sum, const T *part, int64_t count) {
    for (int64_t i = 0; i < count; ++i) sum[i] += get(part + i);
}

constexpr int64_t DEEPEST = 1024;  // width of a head

// The gradient of `attention_inputs`' packed row; what all rows did to the shared beginning's keys is summed.
template <class T>
void attention_inputs_backward(const Grid *grid, const T *d_queries, const T *d_keys, const T *d_values,
                               const float *cosine, const float *sine, T *d_qkv) {
    const Grid g = *grid;
    const int64_t depth = g.depth, half = depth / 2, all = (g.queries + 2 * g.keys) * depth;
    ROWS(int64_t cell = 0; cell < g.rows * g.width; ++cell) {
        const int64_t row = cell / g.width, place = cell % g.width, token = g.source[cell];
        if (token < 0) continue;
        const float *cos = cosine + token * half, *sin = sine + token * half;
        for (int64_t head = 0; head < g.queries; ++head)
            turn(d_queries + g.query_at(row, place, head) * depth, d_qkv + token * all + head * depth, cos, sin, half,
                 -1.0f);
        const bool shared = row == 0 && place < g.prefix;
        for (int64_t head = 0; head < g.keys; ++head) {
            float d_key[DEEPEST] = {}, d_value[DEEPEST] = {};
            const int64_t at = g.key_at(row, g.prefix + place, head) * depth;
            add_to(d_key, d_keys + at, depth);
            add_to(d_value, d_values + at, depth);
            for (int64_t other = 1; shared && other < g.rows; ++other) {
                const int64_t front = g.key_at(other, place, head) * depth;
                add_to(d_key, d_keys + front, depth);
                add_to(d_value, d_values + front, depth);
            }
            T *to = d_qkv + token * all + (g.queries + head) * depth;
            T *to_value = to + g.keys * depth;
            EACH (int64_t i = 0; i < half; ++i) {
                put(to + i, d_key[i] * cos[i] + d_key[half + i] * sin[i]);
                put(to + half + i, d_key[half + i] * cos[i] - d_key[i] * sin[i]);
            }
            EACH (int64_t i = 0; i < depth; ++i) put(to_value + i, d_value[i]);
        }
    }
}

// Keys that a query sees: from `first` to before `last`; none for padding.
inline void span_of(const Grid &g, int64_t row, int64_t place, int64_t *first, int64_t *last) {
    *first = g.prefix > 0 && row == 0 ? g.prefix : 0;
    *last = place < g.lengths[row] ? g.prefix + place + 1 : *first;
}

// Scores ``[rows * keys, group * width, prefix + width]`` become shares; hidden ones 0.
template <class T>
void softmax_forward(const Grid *grid, T *scores) {
    const Grid g = *grid;
    ROWS(int64_t line = 0; line < g.rows * g.queries * g.width; ++line) {
        T *own = scores + line * g.seen();
        int64_t first, last;
        span_of(g, line / (g.queries * g.width), line % g.width, &first, &last);
        float highest = first < last ? get(own + first) : 0.0f, sum = 0;
        for (int64_t i = first; i < last; ++i) highest = get(own + i) > highest ? get(own + i) : highest;
        for (int64_t i = first; i < last; ++i) sum += fast_exp(get(own + i) - highest);
        const float scale = 1.0f / sum;
        EACH (int64_t i = 0; i < first; ++i) put(own + i, 0.0f);
        EACH (int64_t i = first; i < last; ++i) put(own + i, fast_exp(get(own + i) - highest) * scale);
        EACH (int64_t i = last; i < g.seen(); ++i) put(own + i, 0.0f);
    }
}

// The gradient of scores, in place of that of shares.
template <class T>
void softmax_backward(const Grid *grid, const T *shares, T *gradient) {
    const Grid g = *grid;
    ROWS(int64_t line = 0; line < g.rows * g.queries * g.width; ++line) {
        const T *share = shares + line * g.seen();
        T *own = gradient + line * g.seen();
        int64_t first, last;
        span_of(g, line / (g.queries * g.width), line % g.width, &first, &last);
        float sum = 0;
        for (int64_t i = first; i < last; ++i) sum += get(share + i) * get(own + i);
        EACH (int64_t i = 0; i < first; ++i) put(own + i, 0.0f);
        EACH (int64_t i = first; i < last; ++i) put(own + i, get(share + i) * (get(own + i) - sum));
        EACH (int64_t i = last; i < g.seen(); ++i) put(own + i, 0.0f);
    }
}

// From attention's results, laid out as its queries, to a packed row.
template <class T>
void attention_outputs(const Grid *grid, const T *results, T *packed, int64_t stride) {
    const Grid g = *grid;
    ROWS(int64_t cell = 0; cell < g.rows * g.width; ++cell) {
        const int64_t row = cell / g.width, place = cell % g.width, token = g.source[cell];
        for (int64_t head = 0; token >= 0 && head < g.queries; ++head)
            std::memcpy(static_cast<void *>(packed + token * stride + head * g.depth),
                        results + g.query_at(row, place, head) * g.depth, static_cast<size_t>(g.depth) * sizeof(T));
    }
}

// The gradient of attention's results; 0 in the padding.
template <class T>
void attention_outputs_backward(const Grid *grid, const Split<T> *d_packed, T *d_results) {
    const Grid g = *grid;
    const Split<T> split = *d_packed;
    std::vector<float> room(static_cast<size_t>(split.width));
#pragma omp parallel for schedule(static) firstprivate(room)
    for (int64_t cell = 0; cell < g.rows * g.width; ++cell) {
        const int64_t row = cell / g.width, place = cell % g.width, token = g.source[cell];
        float *d = room.data();
        if (token < 0)
            std::memset(d, 0, room.size() * sizeof(float));
        else
            split.read_row(token, d);
        for (int64_t head = 0; head < g.queries; ++head) {
            T *to = d_results + g.query_at(row, place, head) * g.depth;
            EACH (int64_t i = 0; i < g.depth; ++i) put(to + i, d[head * g.depth + i]);
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

#define FOR_TYPE(T, suffix)                                                                                           \
    extern "C" void norm_forward_##suffix(const T *x, const T *added, T *sum, const T *weight, T *out, float *factor, \
                                          int64_t rows, int64_t width, int64_t out_stride, float epsilon) {           \
        norm_forward(x, added, sum, weight, out, factor, rows, width, out_stride, epsilon);                           \
    }                                                                                                                 \
    extern "C" void norm_backward_##suffix(const Split<T> *d_out, const T *x, const T *weight,                        \
                                           const float *factor, const T *added, T *d_x, int64_t rows) {               \
        norm_backward(d_out, x, weight, factor, added, d_x, rows);                                                    \
    }                                                                                                                 \
    extern "C" void swiglu_forward_##suffix(const T *gate_up, T *out, int64_t rows, int64_t width,                    \
                                            int64_t out_stride) {                                                     \
        swiglu_forward(gate_up, out, rows, width, out_stride);                                                        \
    }                                                                                                                 \
    extern "C" void swiglu_backward_##suffix(const Split<T> *d_out, const T *gate_up, T *d_gate_up, int64_t rows) {   \
        swiglu_backward(d_out, gate_up, d_gate_up, rows);                                                             \
    }                                                                                                                 \
    extern "C" void attention_inputs_##suffix(const Grid *grid, const T *qkv, const float *cosine, const float *sine, \
                                              T *queries, T *keys, T *values) {                                       \
        attention_inputs(grid, qkv, cosine, sine, queries, keys, values);                                             \
    }                                                                                                                 \
    extern "C" void attention_inputs_backward_##suffix(const Grid *grid, const T *d_queries, const T *d_keys,         \
                                                       const T *d_values, const float *cosine, const float *sine,     \
                                                       T *d_qkv) {                                                    \
        attention_inputs_backward(grid, d_queries, d_keys, d_values, cosine, sine, d_qkv);                            \
    }                                                                                                                 \
    extern "C" void softmax_forward_##suffix(const Grid *grid, T *scores) { softmax_forward(grid, scores); }          \
    extern "C" void softmax_backward_##suffix(const Grid *grid, const T *shares, T *gradient) {                       \
        softmax_backward(grid, shares, gradient);                                                                     \
    }                                                                                                                 \
    extern "C" void attention_outputs_##suffix(const Grid *grid, const T *results, T *packed, int64_t stride) {       \
        attention_outputs(grid, results, packed, stride);                                                             \
    }                                                                                                                 \
    extern "C" void attention_outputs_backward_##suffix(const Grid *grid, const Split<T> *d_packed, T *d_results) {   \
        attention_outputs_backward(grid, d_packed, d_results);                                                        \
    }                                                                                                                 \
    extern "C" void cross_entropy_##suffix(T *logits, const int64_t *targets, float *losses, int64_t rows,            \
                                           int64_t width, float scale) {                                              \
        cross_entropy(logits, targets, losses, rows, width, scale);                                                   \
    }                                                                                                                 \
    extern "C" void place_##suffix(const float *values, const int64_t *row_places, const int64_t *column_places,      \
                                   T *memory, int64_t rows, int64_t columns) {                                        \
        place(values, row_places, column_places, memory, rows, columns);                                              \
    }

FOR_TYPE(float, fp32)
FOR_TYPE(bf16, bf16)
