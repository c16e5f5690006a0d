// Causal attention over segments that lie end to end: chats, and what chats share. Each sees its own tokens, and in
// front of them some of earlier segments.
//
// Work is split by segment and key head, and what belongs to one is computed by one thread. Scores are not kept: of
// each query there stays the logarithm of the sum of its scores' exponentials, and the backward pass computes them
// again (Dao et al., "FlashAttention", 2022).

#pragma once

#include <numeric>

#include "numbers.h"
#include "products.h"
#include "threads.h"

namespace {

// Where segments lie in a packed row, and what each sees in front of its own tokens.
//
// A token that several segments see gets as many gradients, as a key and as a value. Each segment writes what it has for
// the tokens in its front, and for those of its own tokens that others see (its first ones), into rows, end to end.
struct Segments {
    const int64_t *starts, *lengths;              // of each one's own tokens
    const int64_t *fronts, *front_starts;         // the tokens in front of each, end to end; where they begin
    const int64_t *row_starts;                    // where each one's rows begin
    const int64_t *shared, *reads, *read_starts;  // tokens that several see; the rows of each, end to end
    int64_t count, shared_count;                  // segments, shared tokens
    int64_t queries, keys, depth;                 // query heads, key heads, width of a head
    int64_t window, half;                         // tokens that a query sees; half of a head's turned numbers
    float rest, cap;                              // factor of a head's other numbers; of scores, 0 for none

    int64_t all() const { return (queries + 2 * keys) * depth; }
    int64_t front(int64_t segment) const { return front_starts[segment + 1] - front_starts[segment]; }
    int64_t rows(int64_t segment) const { return row_starts[segment + 1] - row_starts[segment]; }
    // The most keys that a segment sees.
    int64_t most() const {
        int64_t longest = 0;
        for (int64_t segment = 0; segment < count; ++segment) {
            const int64_t seen = front(segment) + lengths[segment];
            longest = seen > longest ? seen : longest;
        }
        return longest;
    }
};

// Queries and keys of a packed row are turned by their positions, in place; backwards with `direction` -1.
template <class T>
void turn_row(const Segments &c, T *heads, int64_t count, const float *cosine, const float *sine, float direction) {
    const int64_t half = c.half, depth = c.depth;
    for (T *left = heads, *right = heads + half; left < heads + count * depth; left += depth, right += depth) {
        EACH (int64_t i = 0; i < half; ++i) {
            const float l = get(left + i), r = get(right + i), s = sine[i] * direction;
            put(left + i, l * cosine[i] - r * s);
            put(right + i, r * cosine[i] + l * s);
        }
        EACH (int64_t i = 2 * half; i < depth; ++i) put(left + i, get(left + i) * c.rest);
    }
}

template <class T>
void turn(const Segments *segments, T *qkv, const float *cosine, const float *sine, int64_t rows) {
    const Segments c = *segments;
    const int64_t half = c.half;
    for_rows(rows, [=](int64_t row) {
        turn_row(c, qkv + row * c.all(), c.queries + c.keys, cosine + row * half, sine + row * half, 1.0f);
    });
}

constexpr int64_t STEP = std::lcm(COLUMNS, TILE);  // scores and their gradients are tiled by both

// One segment before one key head. Its lines are the queries that read this head: those of one token behind each other.
template <class T>
struct View {
    const Segments c;
    const T *qkv;
    const int64_t *in_front;
    const int64_t head, start, length, front, group, lines;

    View(const Segments &segments, const T *row, int64_t segment, int64_t key_head)
        : c(segments),
          qkv(row),
          in_front(segments.fronts + segments.front_starts[segment]),
          head(key_head),
          start(segments.starts[segment]),
          length(segments.lengths[segment]),
          front(segments.front(segment)),
          group(segments.queries / segments.keys),
          lines(length * group) {}

    // A line sees the keys before this one, and none before the first one.
    int64_t limit(int64_t line) const { return front + line / group + 1; }
    int64_t first(int64_t line) const { return limit(line) > c.window ? limit(line) - c.window : 0; }
    // The same, rounded down so that tiles fit.
    int64_t first_column(int64_t line) const { return first(line) / STEP * STEP; }
    int64_t limit_of_lines_before(int64_t line) const { return limit((line < lines ? line : lines) - 1); }
    int64_t token(int64_t line) const { return start + line / group; }
    int64_t query_head(int64_t line) const { return head * group + line % group; }
    int64_t key_token(int64_t key) const { return key < front ? in_front[key] : start + key - front; }
    const T *query(int64_t line) const { return qkv + token(line) * c.all() + query_head(line) * c.depth; }
    const T *key(int64_t at) const { return qkv + key_token(at) * c.all() + (c.queries + head) * c.depth; }
    const T *value(int64_t at) const { return key(at) + c.keys * c.depth; }
    // Where a line's part stands in a packed row of results.
    int64_t result(int64_t line, int64_t stride) const { return token(line) * stride + query_head(line) * c.depth; }
};

constexpr int64_t LINES = 4 * TILE;  // whose gradients of keys and values are summed at once

// Each thread's space for what one view needs: `keys` and `depth` rounded up so that tiles fit.
template <class T>
struct Desk {
    typedef typename Word<T>::type word;
    const int64_t keys, depth;
    Buffer<word> by_key, by_value, key_rows, value_rows;
    Buffer<float> scores, d_scores, lines;

    Desk(const Segments &c, int64_t most)
        : keys(up(most, COLUMNS) * COLUMNS + COLUMNS),
          depth(up(c.depth, COLUMNS) * COLUMNS),
          by_key(keys * depth),
          by_value(keys * depth),
          key_rows(keys * depth),
          value_rows(keys * depth),
          scores(TILE * keys),
          d_scores(TILE * keys),
          lines(TILE * depth) {}
};

// left[TILE]: where lines from `line` on begin; behind the last one, the last one.
template <class T, class Line>
void lines_from(int64_t line, int64_t lines, Line line_of, const typename Word<T>::type **left) {
    for (int64_t i = 0; i < TILE; ++i) {
        const T *own = line_of(line + i < lines ? line + i : lines - 1);
        left[i] = reinterpret_cast<const typename Word<T>::type *>(own);
    }
}

// sums[TILE][stride] = left · panels, for the first `columns` columns of panels of `height` words each.
template <class T, bool ADDS>
void tiles(const typename Word<T>::type *const *left, int64_t stride, const typename Word<T>::type *panels,
           int64_t height, int64_t steps, int64_t columns, float *sums, int64_t sums_stride) {
    for (int64_t from = 0; from < columns; from += COLUMNS)
        tile<T, ADDS, TILE>(left, stride, panels + from * height, steps, sums + from, sums_stride);
}

// A line's scores become exponentials, from `limit` on 0. Returns what they sum to, and its logarithm in `log_sum`.
inline float exponentials(float *scores, int64_t limit, int64_t last, float *log_sum) {
    const int64_t whole = up(limit, COLUMNS) * COLUMNS;
    for (int64_t i = limit; i < whole; ++i) scores[i] = scores[0];
    const float highest = highest_of(scores, whole);
    float sum = 0;
    for (int64_t i = 0; i < limit; ++i) {
        const float own = fast_exp(scores[i] - highest);
        scores[i] = own;
        sum += own;
    }
    for (int64_t i = limit; i < last; ++i) scores[i] = 0;
    *log_sum = highest + __builtin_logf(sum);
    return sum;
}

inline void cap_scores(float *scores, int64_t count, float cap) {
    if (cap == 0) return;
    EACH (int64_t i = 0; i < count; ++i) scores[i] = capped(scores[i], cap);
}

template <class T>
void put_line(const float *from, float scale, T *to, int64_t count) {
    EACH (int64_t i = 0; i < count; ++i) put(to + i, from[i] * scale);
}

// The results of one view's queries, into ``out [row, stride]``, and the logarithms ``[row, queries]``.
template <class T>
void attend(const View<T> &view, Desk<T> &desk, T *out, int64_t stride, float *log_sums) {
    typedef typename Word<T>::type word;
    const int64_t depth = view.c.depth, seen = view.front + view.length, pair = Word<T>::NUMBERS;
    const int64_t steps = depth / pair, height = up(seen, pair);
    pack_columns<T>(seen, depth, [&](int64_t at) { return view.key(at); }, desk.by_key.get());
    pack_rows<T>(seen, depth, [&](int64_t at) { return view.value(at); }, desk.value_rows.get());
    float *scores = desk.scores.get(), *results = desk.lines.get(), sums[TILE];
    const word *left[TILE];
    T *shares = reinterpret_cast<T *>(desk.by_value.get());
    for (int64_t line = 0; line < view.lines; line += TILE) {
        const int64_t last = view.limit_of_lines_before(line + TILE), used = up(last, pair) * pair;
        const int64_t from = view.first_column(line);
        lines_from<T>(line, view.lines, [&](int64_t at) { return view.query(at); }, left);
        tiles<T, false>(left, sizeof(word), desk.by_key.get() + from * steps, steps, steps, last - from, scores + from,
                        desk.keys);
        for (int64_t i = 0; i < TILE && line + i < view.lines; ++i) {
            float *log_sum = log_sums + view.token(line + i) * view.c.queries + view.query_head(line + i);
            float *own = scores + i * desk.keys;
            const int64_t first = view.first(line + i);
            cap_scores(own + from, last - from, view.c.cap);
            sums[i] = exponentials(own + first, view.limit(line + i) - first, used - first, log_sum);
            for (int64_t j = from; j < first; ++j) own[j] = 0;
            put_line(own + from, 1.0f, shares + i * desk.keys + from, used - from);
        }
        lines_from<T>(0, view.lines - line, [&](int64_t at) { return shares + at * desk.keys + from; }, left);
        tiles<T, false>(left, sizeof(word), desk.value_rows.get() + from / pair * COLUMNS, height, up(last - from, pair),
                        depth, results, desk.depth);
        for (int64_t i = 0; i < TILE && line + i < view.lines; ++i)
            put_line(results + i * desk.depth, 1.0f / sums[i], out + view.result(line + i, stride), depth);
    }
}

template <class T>
void attention_forward(const Segments *segments, const T *qkv, T *out, int64_t stride, float *log_sums) {
    const Segments c = *segments;
    const int64_t most = c.most();
    Tasks tasks;
    in_threads([=, &tasks] {
        Desk<T> desk(c, most);
        for (int64_t task; (task = tasks.take(c.count * c.keys)) >= 0;)
            attend(View<T>(c, qkv, task / c.keys, task % c.keys), desk, out, stride, log_sums);
    });
}

// Space for one block of lines on the backward pass.
template <class T>
struct Block {
    typedef typename Word<T>::type word;
    Buffer<word> shares, d_scores, queries, d_results;
    Buffer<float> d_keys, d_values;

    explicit Block(const Desk<T> &desk)
        : shares(LINES * desk.keys),
          d_scores(LINES * desk.keys),
          queries(LINES * desk.depth),
          d_results(LINES * desk.depth),
          d_keys(desk.keys * desk.depth),
          d_values(desk.keys * desk.depth) {}
};

// What an attention's backward pass is given, and where its results go.
template <class T>
struct Backward {
    const T *qkv, *out, *d_out;  // out and its gradient ``[row, queries * depth]``
    int64_t out_stride, d_out_stride;
    const float *log_sums, *cosine, *sine;
    T *d_qkv;
};

// One tile of lines on the backward pass: writes the gradients of its queries, and puts its shares and the gradients of its
// scores into the block, pairs of lines in a word, from the key `from` to `last`: 0 where a line doesn't see a key.
template <class T>
void tile_backward(const View<T> &view, const Backward<T> &b, Desk<T> &desk, Block<T> &block, int64_t line,
                   int64_t in_block, int64_t from, int64_t last) {
    typedef typename Word<T>::type word;
    const int64_t depth = view.c.depth, pair = Word<T>::NUMBERS, steps = depth / pair;
    const int64_t height = up(view.front + view.length, pair);
    const int64_t own_last = view.limit_of_lines_before(line + TILE);
    float *scores = desk.scores.get(), *d_scores = desk.d_scores.get(), *results = desk.lines.get();
    const word *left[TILE];
    lines_from<T>(line, view.lines, [&](int64_t at) { return view.query(at); }, left);
    tiles<T, false>(left, sizeof(word), desk.by_key.get() + from * steps, steps, steps, own_last - from, scores + from,
                    desk.keys);
    const auto d_result = [&](int64_t at) { return b.d_out + view.result(at, b.d_out_stride); };
    lines_from<T>(line, view.lines, d_result, left);
    tiles<T, false>(left, sizeof(word), desk.by_value.get() + from * steps, steps, steps, own_last - from,
                    d_scores + from, desk.keys);
    T *rounded = reinterpret_cast<T *>(desk.value_rows.get());
    for (int64_t i = 0; i < TILE; ++i) {
        float *own = scores + i * desk.keys, *d_own = d_scores + i * desk.keys;
        const int64_t at = line + i, limit = at < view.lines ? view.limit(at) : from;
        const int64_t first = at < view.lines ? view.first(at) : from;
        if (limit > from) {
            const T *d = d_result(at), *result = b.out + view.result(at, b.out_stride);
            float shared = 0;
            for (int64_t j = 0; j < depth; ++j) shared += get(d + j) * get(result + j);
            const float log_sum = b.log_sums[view.token(at) * view.c.queries + view.query_head(at)];
            if (view.c.cap != 0) {
                EACH (int64_t j = first; j < limit; ++j) {
                    const float y = capped(own[j], view.c.cap);
                    own[j] = fast_exp(y - log_sum);
                    d_own[j] = own[j] * (d_own[j] - shared) * slope_of_capped(y, view.c.cap);
                }
            } else {
                EACH (int64_t j = first; j < limit; ++j) {
                    own[j] = fast_exp(own[j] - log_sum);
                    d_own[j] = own[j] * (d_own[j] - shared);
                }
            }
        }
        for (int64_t j = from; j < first; ++j) own[j] = d_own[j] = 0;
        for (int64_t j = limit; j < last; ++j) own[j] = d_own[j] = 0;
        put_line(d_own + from, 1.0f, rounded + i * desk.keys + from, up(own_last, pair) * pair - from);
    }
    for (int64_t i = 0; i < TILE; i += pair) {
        const float *own = scores + i * desk.keys, *d_own = d_scores + i * desk.keys;
        word *to = block.shares.get() + (in_block + i) / pair * desk.keys;
        word *d_to = block.d_scores.get() + (in_block + i) / pair * desk.keys;
        EACH (int64_t j = from; j < last; ++j) to[j] = Word<T>::rounded(own + j, desk.keys);
        EACH (int64_t j = from; j < last; ++j) d_to[j] = Word<T>::rounded(d_own + j, desk.keys);
    }
    lines_from<T>(0, TILE, [&](int64_t at) { return rounded + at * desk.keys + from; }, left);
    tiles<T, false>(left, sizeof(word), desk.key_rows.get() + from / pair * COLUMNS, height, up(own_last - from, pair),
                    depth, results, desk.depth);
    for (int64_t i = 0; i < TILE && line + i < view.lines; ++i) {
        float *own = results + i * desk.depth;
        const int64_t token = view.token(line + i), half = view.c.half;
        turn_row(view.c, own, 1, b.cosine + token * half, b.sine + token * half, -1.0f);
        put_line(own, 1.0f, b.d_qkv + token * view.c.all() + view.query_head(line + i) * depth, depth);
    }
}

// Adds a block of lines' part to the gradients of keys and values, of the keys from `from` to `last`.
template <class T>
void block_backward(const View<T> &view, const Backward<T> &b, const Desk<T> &desk, Block<T> &block, int64_t line,
                    int64_t lines, int64_t from, int64_t last) {
    typedef typename Word<T>::type word;
    const int64_t depth = view.c.depth, pair = Word<T>::NUMBERS, steps = up(lines, pair);
    pack_rows<T>(lines, depth, [&](int64_t at) { return view.query(line + at); }, block.queries.get());
    const auto d_result = [&](int64_t at) { return b.d_out + view.result(line + at, b.d_out_stride); };
    pack_rows<T>(lines, depth, d_result, block.d_results.get());
    const word *left[TILE];
    for (int64_t key = from; key < last; key += TILE) {
        // Lines before this one don't see the keys.
        int64_t first = (key - view.front) * view.group - line;
        first = first > 0 ? first / pair : 0;
        for (int64_t i = 0; i < TILE; ++i) left[i] = block.shares.get() + first * desk.keys + key + i;
        tiles<T, true>(left, desk.keys * sizeof(word), block.d_results.get() + first * COLUMNS, steps, steps - first, depth,
                 block.d_values.get() + key * desk.depth, desk.depth);
        for (int64_t i = 0; i < TILE; ++i) left[i] = block.d_scores.get() + first * desk.keys + key + i;
        tiles<T, true>(left, desk.keys * sizeof(word), block.queries.get() + first * COLUMNS, steps, steps - first, depth,
                 block.d_keys.get() + key * desk.depth, desk.depth);
    }
}

// The gradients of a key and its value, from fp32, into their token's place.
template <class T>
void put_key(const Segments &c, const Backward<T> &b, int64_t token, int64_t head, float *d_key, const float *d_value) {
    const int64_t half = c.half;
    T *to = b.d_qkv + token * c.all() + (c.queries + head) * c.depth;
    turn_row(c, d_key, 1, b.cosine + token * half, b.sine + token * half, -1.0f);
    put_line(d_key, 1.0f, to, c.depth);
    put_line(d_value, 1.0f, to + c.keys * c.depth, c.depth);
}

// The gradients of one view. Those of the first keys and values go to ``rows [row_count, 2 * depth]``.
template <class T>
void attend_backward(const View<T> &view, const Backward<T> &b, Desk<T> &desk, Block<T> &block, float *rows,
                     int64_t row_count) {
    const int64_t depth = view.c.depth, seen = view.front + view.length;
    pack_columns<T>(seen, depth, [&](int64_t at) { return view.key(at); }, desk.by_key.get());
    pack_columns<T>(seen, depth, [&](int64_t at) { return view.value(at); }, desk.by_value.get());
    pack_rows<T>(seen, depth, [&](int64_t at) { return view.key(at); }, desk.key_rows.get());
    const size_t used = static_cast<size_t>(up(seen, TILE) * TILE * desk.depth) * sizeof(float);
    std::memset(block.d_keys.get(), 0, used);
    std::memset(block.d_values.get(), 0, used);
    for (int64_t line = 0; line < view.lines; line += LINES) {
        const int64_t lines = view.lines - line < LINES ? view.lines - line : LINES;
        const int64_t last = view.limit_of_lines_before(line + lines), rounded = up(last, TILE) * TILE;
        const int64_t from = view.first_column(line);
        for (int64_t at = 0; at < lines; at += TILE) tile_backward(view, b, desk, block, line + at, at, from, rounded);
        block_backward(view, b, desk, block, line, lines, from, last);
    }
    for (int64_t at = 0; at < seen; ++at) {
        float *d_key = block.d_keys.get() + at * desk.depth, *d_value = block.d_values.get() + at * desk.depth;
        if (at < row_count) {
            put_line(d_key, 1.0f, rows + at * 2 * depth, depth);
            put_line(d_value, 1.0f, rows + (at * 2 + 1) * depth, depth);
        } else {
            put_key(view.c, b, view.key_token(at), view.head, d_key, d_value);
        }
    }
}

template <class T>
void attention_backward(const Segments *segments, const Backward<T> *given) {
    const Segments c = *segments;
    const Backward<T> b = *given;
    const int64_t most = c.most(), width = 2 * c.depth, by_head = c.row_starts[c.count] * width;
    Buffer<float> rows(c.keys * by_head);
    Tasks tasks;
    in_threads([=, &tasks, &rows] {
        Desk<T> desk(c, most);
        Block<T> block(desk);
        for (int64_t task; (task = tasks.take(c.count * c.keys)) >= 0;) {
            const int64_t segment = task / c.keys, head = task % c.keys;
            float *own = rows.get() + head * by_head + c.row_starts[segment] * width;
            attend_backward(View<T>(c, b.qkv, segment, head), b, desk, block, own, c.rows(segment));
        }
    });
    // What all segments did to a shared key is summed in their order.
    for_rows(c.shared_count * c.keys, [=, &rows](int64_t at) {
        const int64_t number = at / c.keys, head = at % c.keys;
        const int64_t *read = c.reads + c.read_starts[number], *end = c.reads + c.read_starts[number + 1];
        float *of_head = rows.get() + head * by_head, *sum = of_head + *read * width;
        while (++read < end) {
            const float *own = of_head + *read * width;
            EACH (int64_t i = 0; i < width; ++i) sum[i] += own[i];
        }
        put_key(c, b, c.shared[number], head, sum, sum + c.depth);
    });
}

}  // namespace
