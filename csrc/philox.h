// Philox-4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
// One draw is a pure function of (key, counter), so it is the same for any thread count and any split of a batch.
#pragma once

#include <cstdint>

namespace bert_fast {

struct Philox {
    static constexpr int kRounds = 10;
    static constexpr uint32_t kMultiplier0 = 0xD2511F53u;
    static constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
    static constexpr uint32_t kWeyl0 = 0x9E3779B9u;
    static constexpr uint32_t kWeyl1 = 0xBB67AE85u;

    uint32_t key0;
    uint32_t key1;

    explicit Philox(uint64_t seed) : key0(static_cast<uint32_t>(seed)), key1(static_cast<uint32_t>(seed >> 32)) {}

    // Replaces the counter (c0, c1, c2, c3) by four random words.
    void operator()(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) const {
        uint32_t k0 = key0;
        uint32_t k1 = key1;
        for (int round = 0; round < kRounds; ++round) {
            const uint64_t product0 = uint64_t{kMultiplier0} * c0;
            const uint64_t product1 = uint64_t{kMultiplier1} * c2;
            c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
            c1 = static_cast<uint32_t>(product1);
            c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
            c3 = static_cast<uint32_t>(product0);
            k0 += kWeyl0;
            k1 += kWeyl1;
        }
    }
};

}  // namespace bert_fast
