// The threads of one parallel region, which wait for one another by looking. OpenMP's barriers put a thread to sleep within
// microseconds once the process has had more threads than there are cores (another Python thread that ran an operator
// is enough), and to wake it takes longer than the work between two barriers of a short text.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace bert_fast::cpu {

// Threads that are worth waking for this many elements of work that does little with each: to wake one takes as long as
// to do some ten thousand of them.
inline int useful_threads(int threads, int64_t elements) {
    constexpr int64_t kElementsPerThread = 32 * 1024;
    return static_cast<int>(std::min<int64_t>(threads, elements / kElementsPerThread + 1));
}

// What the threads share.
class Team {
  public:
    // Returns when all `size` threads have called it; what they wrote before is seen by all after it.
    void wait(int size) {
        if (size == 1) {
            next_.store(0, std::memory_order_relaxed);
            return;
        }
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int looks = 0; phase_.load(std::memory_order_acquire) == phase; ++looks) {
            if (looks < kLooks) {
                pause();
            } else {
                std::this_thread::yield();  // another program may need the core, perhaps the very one that we wait for
            }
        }
    }

    int64_t take_next() { return next_.fetch_add(1, std::memory_order_relaxed); }

  private:
    static constexpr int kLooks = 4096;  // some 50 microseconds

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("isb");
#endif
    }

    // Apart, since one of them is written while another is looked at.
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
};

// One of the threads, within the parallel region.
class Worker {
  public:
    explicit Worker(Team& team) : team_(team), number_(0), size_(1) {
#ifdef _OPENMP
        number_ = omp_get_thread_num();
        size_ = omp_get_num_threads();
#endif
    }

    int number() const { return number_; }

    // This thread's part of `count` things, neighbours all of them.
    int64_t first_of(int64_t count) const { return count * number_ / size_; }
    int64_t last_of(int64_t count) const { return count * (number_ + 1) / size_; }

    void wait() const { team_.wait(size_); }

    // body(i) for every i below `count`, a thread taking the next one when it is free; then all wait.
    template <typename Body>
    void share_out(int64_t count, const Body& body) const {
        for (int64_t i = team_.take_next(); i < count; i = team_.take_next()) body(i);
        wait();
    }

    // The same, each thread doing its part.
    template <typename Body>
    void share_evenly(int64_t count, const Body& body) const {
        for (int64_t i = first_of(count), last = last_of(count); i < last; ++i) body(i);
        wait();
    }

  private:
    Team& team_;
    int number_;
    int size_;
};

}  // namespace bert_fast::cpu
