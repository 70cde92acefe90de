// Memory that is filled once and read often, in large pages where the system has them: a model's weights are spread over
// more small pages than the processor can keep the addresses of.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bert_fast {

class Arena {
  public:
    Arena() = default;
    Arena(Arena&& other) noexcept : blocks_(std::move(other.blocks_)), next_(other.next_), left_(other.left_) {
        other.blocks_.clear();
        other.left_ = 0;
    }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() {
        for (void* block : blocks_) std::free(block);
    }

    // Uninitialised, aligned to a cache line.
    template <typename T>
    T* take(size_t count) {
        const size_t size = (count * sizeof(T) + kLine - 1) / kLine * kLine;
        if (size > left_) add_block(std::max(size, kBlock));
        char* result = next_;
        next_ += size;
        left_ -= size;
        return reinterpret_cast<T*>(result);
    }

  private:
    static constexpr size_t kLine = 64;
    static constexpr size_t kPage = size_t{2} << 20;
    static constexpr size_t kBlock = 4 * kPage;

    void add_block(size_t size) {
        size = (size + kPage - 1) / kPage * kPage;
        void* block = std::aligned_alloc(kPage, size);
        if (block == nullptr) throw std::bad_alloc();
        blocks_.push_back(block);
#if defined(MADV_HUGEPAGE)
        madvise(block, size, MADV_HUGEPAGE);  // a wish: it may fail
#endif
        next_ = static_cast<char*>(block);
        left_ = size;
    }

    std::vector<void*> blocks_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

}  // namespace bert_fast
