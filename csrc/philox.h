// Philox-4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
// One draw is a pure function of (key, counter), so it is the same for any thread count and any split of a batch.
#pragma once

#include <cstdint>

namespace bert_fast {

struct Philox {
    uint32_t key0;
    uint32_t key1;

    explicit Philox(uint64_t seed) : key0(static_cast<uint32_t>(seed)), key1(static_cast<uint32_t>(seed >> 32)) {}

    // Replaces the counter (c0, c1, c2, c3) by four random words.
    inline __attribute__((always_inline)) void operator()(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) const {
        uint32_t k0 = key0;
        uint32_t k1 = key1;
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
            const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
            c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
            c1 = static_cast<uint32_t>(product1);
            c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
            c3 = static_cast<uint32_t>(product0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
    }
};

}  // namespace bert_fast
