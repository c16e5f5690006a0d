// The compiled parts of a training step, as Python calls them through ctypes: with the addresses of contiguous tensors
// (strides, in elements, where a row has space for more).
//
// Plain C++ without PyTorch's headers, so that it compiles in seconds. Work is split so that no sum crosses a border
// between threads, and results don't depend on the number of threads.

#include "adapters.h"
#include "attention.h"
#include "elementwise.h"
#include "experts.h"
#include "matrices.h"

#define FOR_TYPE(T, suffix)                                                                                           \
    extern "C" void norm_forward_##suffix(const T *x, const T *added, T *sum, const T *weight, T *out,                \
                                            float *factor, int64_t rows, int64_t width, int64_t out_stride,           \
                                            float epsilon) {                                                          \
        norm_forward<Stored>(x, added, sum, weight, out, factor, rows, width, out_stride, epsilon);                   \
    }                                                                                                                 \
    extern "C" void norm_backward_##suffix(const Split<T> *d_out, const T *x, const T *weight,                        \
                                             const float *factor, const T *added, T *d_x, int64_t rows) {             \
        norm_backward<Stored>(d_out, x, weight, factor, added, d_x, rows);                                            \
    }                                                                                                                 \
    extern "C" void norm_less_one_forward_##suffix(const T *x, const T *added, T *sum, const T *weight, T *out,       \
                                            float *factor, int64_t rows, int64_t width, int64_t out_stride,           \
                                            float epsilon) {                                                          \
        norm_forward<LessOne>(x, added, sum, weight, out, factor, rows, width, out_stride, epsilon);                  \
    }                                                                                                                 \
    extern "C" void norm_less_one_backward_##suffix(const Split<T> *d_out, const T *x, const T *weight,               \
                                             const float *factor, const T *added, T *d_x, int64_t rows) {             \
        norm_backward<LessOne>(d_out, x, weight, factor, added, d_x, rows);                                           \
    }                                                                                                                 \
    extern "C" void join_##suffix(const Split<T> *gradient, T *out, int64_t rows) { join(gradient, out, rows); }      \
    extern "C" void swiglu_forward_##suffix(const T *gate_up, T *out, int64_t rows, int64_t width,                    \
                                            int64_t out_stride) {                                                     \
        gated_forward<Silu>(gate_up, out, rows, width, out_stride);                                                   \
    }                                                                                                                 \
    extern "C" void swiglu_backward_##suffix(const Split<T> *d_out, const T *gate_up, T *d_gate_up, int64_t rows) {   \
        gated_backward<Silu>(d_out, gate_up, d_gate_up, rows);                                                        \
    }                                                                                                                 \
    extern "C" void geglu_forward_##suffix(const T *gate_up, T *out, int64_t rows, int64_t width,                     \
                                           int64_t out_stride) {                                                      \
        gated_forward<Gelu>(gate_up, out, rows, width, out_stride);                                                   \
    }                                                                                                                 \
    extern "C" void geglu_backward_##suffix(const Split<T> *d_out, const T *gate_up, T *d_gate_up, int64_t rows) {    \
        gated_backward<Gelu>(d_out, gate_up, d_gate_up, rows);                                                        \
    }                                                                                                                 \
    extern "C" void lower_##suffix(const T *x, int64_t x_stride, const T *down, T *out, int64_t out_stride,           \
                                   int64_t tokens, int64_t width, int64_t rank) {                                     \
        lower(x, x_stride, down, out, out_stride, tokens, width, rank);                                               \
    }                                                                                                                 \
    extern "C" void add_product_##suffix(const Side<T> *thin, const Side<T> *wide, int64_t tokens, float *gradient,   \
                                         float factor, int64_t transposed) {                                          \
        add_product(thin, wide, tokens, gradient, factor, transposed);                                                \
    }                                                                                                                 \
    extern "C" void turn_##suffix(const Segments *segments, T *qkv, const float *cosine, const float *sine,           \
                                int64_t rows) {                                                                       \
        turn(segments, qkv, cosine, sine, rows);                                                                      \
    }                                                                                                                 \
    extern "C" void attention_forward_##suffix(const Segments *segments, const T *qkv, T *out, int64_t stride,        \
                                               float *log_sums) {                                                     \
        attention_forward(segments, qkv, out, stride, log_sums);                                                      \
    }                                                                                                                 \
    extern "C" void attention_backward_##suffix(const Segments *segments, const Backward<T> *given) {                 \
        attention_backward(segments, given);                                                                          \
    }                                                                                                                 \
    extern "C" void cross_entropy_##suffix(T *logits, const int64_t *targets, float *losses, int64_t rows,            \
                                           int64_t width, float scale) {                                              \
        cross_entropy(logits, targets, losses, rows, width, scale);                                                   \
    }                                                                                                                 \
    extern "C" void scale_logits_##suffix(T *logits, int64_t rows, int64_t width, float factor, float cap) {          \
        scale_logits(logits, rows, width, factor, cap);                                                               \
    }                                                                                                                 \
    extern "C" void scaled_cross_entropy_##suffix(T *logits, const int64_t *targets, float *losses, int64_t rows,     \
                                                  int64_t width, float scale, float factor, float cap) {              \
        scaled_cross_entropy(logits, targets, losses, rows, width, scale, factor, cap);                               \
    }                                                                                                                 \
    extern "C" void place_##suffix(const float *values, const int64_t *row_places, const int64_t *column_places,      \
                                   T *memory, int64_t rows, int64_t columns) {                                        \
        place(values, row_places, column_places, memory, rows, columns);                                              \
    }

// A training has one dtype, and compiling for both would take twice as long.
#ifdef ONLY_BF16
FOR_TYPE(bf16, bf16)
#endif

#ifdef ONLY_FP32
FOR_TYPE(float, fp32)

#if defined(__AVX2__) && !defined(__AVX512F__)
#define FOR_STORED(T, suffix)                                                                                         \
    extern "C" void product_forward_##suffix(const Matrix<T> *matrix, const float *x, int64_t x_stride, float *out,   \
                                             int64_t tokens) {                                                        \
        product_forward(matrix, x, x_stride, out, tokens);                                                            \
    }                                                                                                                 \
    extern "C" void product_backward_##suffix(const Matrix<T> *matrix, const float *d_out, int64_t d_out_stride,      \
                                              float *out, int64_t tokens) {                                           \
        product_backward(matrix, d_out, d_out_stride, out, tokens);                                                   \
    }                                                                                                                 \
    extern "C" void experts_forward_##suffix(const ExpertWeight<T> *weight, const int64_t *starts, const Rows *x,     \
                                             float *low, float *out) {                                                \
        experts_forward(weight, starts, x, low, out);                                                                 \
    }                                                                                                                 \
    extern "C" void experts_backward_##suffix(const ExpertWeight<T> *weight, const int64_t *starts,                   \
                                              const Rows *d_out, float *d_low, float *d_x) {                          \
        experts_backward(weight, starts, d_out, d_low, d_x);                                                          \
    }

FOR_STORED(float, of_fp32)
FOR_STORED(bf16, of_bf16)

extern "C" void experts_gradient(const int64_t *starts, int64_t experts, const float *thin, int64_t rank,
                                 const Rows *wide, int64_t width, float *gradient, int64_t transposed) {
    experts_gradient_of(starts, experts, thin, rank, wide, width, gradient, transposed);
}
#endif
#endif
