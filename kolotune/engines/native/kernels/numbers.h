// Numbers of both widths, and what is computed of single ones.

#pragma once

#include <cstdint>
#include <cstring>

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

// tanh within some 1e-7 of itself (Cephes: a polynomial near 0, where the other form would cancel).
inline float fast_tanh(float x) {
    const float size = x < 0 ? -x : x, square = x * x;
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const float small = x + x * square * p, large = 1.0f - 2.0f / (fast_exp(2.0f * size) + 1.0f);
    return size < 0.625f ? small : x < 0 ? -large : large;
}

// A number below `cap`, and the slope at it.
inline float capped(float x, float cap) { return cap * fast_tanh(x / cap); }
inline float slope_of_capped(float y, float cap) { return 1.0f - (y / cap) * (y / cap); }

// The highest of some numbers (one at least); what is no number is passed over where another one is. By lanes, since no
// compiler may turn a plain loop around that has to mind what is no number.
template <class T>
inline float highest_of(const T *numbers, int64_t count) {
    constexpr int64_t AT_ONCE = 32;
    float best = get(numbers);
    if (count >= AT_ONCE) {
        float lanes[AT_ONCE];
        for (int64_t j = 0; j < AT_ONCE; ++j) lanes[j] = get(numbers + j);
        for (int64_t i = AT_ONCE; i + AT_ONCE <= count; i += AT_ONCE) {
            for (int64_t j = 0; j < AT_ONCE; ++j) {
                const float own = get(numbers + i + j);
                lanes[j] = own > lanes[j] ? own : lanes[j];
            }
        }
        for (int64_t j = 0; j < AT_ONCE; ++j) best = lanes[j] > best ? lanes[j] : best;
    }
    for (int64_t i = count - count % AT_ONCE; i < count; ++i) best = get(numbers + i) > best ? get(numbers + i) : best;
    return best;
}

// Iterations don't depend on each other, which a compiler can't know of pointers.
#ifdef __clang__
#define EACH _Pragma("clang loop vectorize(assume_safety)") for
#else
#define EACH _Pragma("GCC ivdep") for
#endif

}  // namespace
