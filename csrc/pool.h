// Memory for results, used again. A large block that is freed goes back to the system, and the next one is new pages: at
// these sizes touching new pages costs several times what computing their contents does.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace bert_fast {

class Pool {
  public:
    struct Block {
        void* data;
        size_t size;
    };

    // At least `size` bytes, aligned to a cache line.
    Block take(size_t size) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            const auto fits = [&](const Block& block) { return block.size >= size && block.size / 2 <= size; };
            const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(), fits);
            if (found != blocks_.rend()) {
                const Block block = *found;
                blocks_.erase(std::next(found).base());
                held_ -= block.size;
                return block;
            }
        }
        const size_t rounded = (size + kLine - 1) / kLine * kLine;
        void* data = std::aligned_alloc(kLine, std::max(rounded, kLine));
        if (data == nullptr) throw std::bad_alloc();
        return {data, std::max(rounded, kLine)};
    }

    // Keeps the block for the next call, at the price of the oldest ones where that would be too much.
    void give_back(Block block) {
        const std::lock_guard<std::mutex> lock(mutex_);
        blocks_.push_back(block);
        held_ += block.size;
        while (blocks_.size() > kMaxBlocks || held_ > kMaxBytes) {
            std::free(blocks_.front().data);
            held_ -= blocks_.front().size;
            blocks_.erase(blocks_.begin());
        }
    }

    // Never destroyed: what was taken from it may outlive every static object.
    static Pool& instance() {
        static Pool& pool = *new Pool;
        return pool;
    }

  private:
    static constexpr size_t kLine = 64;
    static constexpr size_t kMaxBlocks = 16;
    static constexpr size_t kMaxBytes = size_t{128} << 20;

    std::mutex mutex_;
    std::vector<Block> blocks_;  // the most recently used last
    size_t held_ = 0;
};

// An uninitialised array of plain values whose memory comes from the pool and returns to it.
template <typename T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t size) : block_(Pool::instance().take(size * sizeof(T))), size_(size) {}
    Buffer(Buffer&& other) noexcept : block_(other.block_), size_(other.size_) { other.block_.data = nullptr; }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(block_, other.block_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Buffer() {
        if (block_.data != nullptr) Pool::instance().give_back(block_);
    }

    T* data() const { return static_cast<T*>(block_.data); }
    size_t size() const { return size_; }

  private:
    Pool::Block block_{nullptr, 0};
    size_t size_ = 0;
};

}  // namespace bert_fast
