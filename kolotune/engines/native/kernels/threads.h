// Loops that threads share: PyTorch's own, which are OpenMP's. The library is called by its functions and not by pragmas,
// so that a compiler without OpenMP of its own, or with another one, will do: two of them in one process would compete
// for the cores.

#pragma once

#include <atomic>
#include <cstdint>

extern "C" {
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_max_threads(void);
int omp_get_num_threads(void);
int omp_get_thread_num(void);
}

namespace {

// Call `body` once in each thread. It is copied there, so that what it captured by value can stay in registers.
template <class Body>
void in_threads(const Body &body) {
    const auto call = [](void *data) {
        const Body own = *static_cast<const Body *>(data);
        own();
    };
    GOMP_parallel(call, const_cast<Body *>(&body), 0, 0);
}

// What of `count` tasks is this thread's: neighbours.
struct Share {
    int64_t first, last;

    explicit Share(int64_t count) {
        const int64_t threads = omp_get_num_threads(), own = omp_get_thread_num();
        const int64_t each = count / threads, more = count % threads;
        first = own * each + (own < more ? own : more);
        last = first + each + (own < more);
    }
};

// Call ``body(row)`` for each of `count` rows.
template <class Body>
void for_rows(int64_t count, const Body &body) {
    in_threads([=] {
        const Share share(count);
        for (int64_t row = share.first; row < share.last; ++row) body(row);
    });
}

// Tasks of unlike size: a thread takes the next one when it is done with one.
class Tasks {
   public:
    // The next one below `end`; -1 where none is left.
    int64_t take(int64_t end) {
        int64_t next = next_.load(std::memory_order_relaxed);
        while (next < end) {
            if (next_.compare_exchange_weak(next, next + 1, std::memory_order_relaxed)) return next;
        }
        return -1;
    }

   private:
    std::atomic<int64_t> next_{0};
};

}  // namespace
