// The page checksum, as one definition for the C++ twin and the CUDA kernel. 64 bits; finds corruption, not forgery.
//
// A page is cut into chunks of 1 KiB (the last one padded with zeros), a chunk into 16 stripes of 8 words of 64 bits;
// the words of one column are a lane. Lane l of chunk c accumulates over its stripes s
//     product += low32(w ^ key[s][l]) * high32(w ^ key[s][l])      (the multiplication of XXH3's accumulator)
//     trail    = rotate_left(trail, 1) + w                         (a change of a single word always changes this)
// and gives the term  mix(mix(product + (c * 8 + l + 1) * GOLDEN) ^ trail).  The checksum is mix(sum of terms ^ length
// * GOLDEN). Terms are summed, so chunks and lanes are independent: SIMD on the CPU, threads on the GPU, numpy in the
// fall-back.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LSP_BOTH __host__ __device__ __forceinline__
#else
#define LSP_BOTH inline
#endif

namespace lsp {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
constexpr int LANES = 8;
constexpr int STRIPES = 16;
constexpr int CHUNK = LANES * STRIPES * 8;

// The finaliser of splitmix64 (Steele, Lea, Flood 2014, variant 13 of Stafford): a bijection with full avalanche.
LSP_BOTH constexpr uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

LSP_BOTH constexpr uint64_t key(int stripe, int lane) { return mix((stripe * LANES + lane + 1) * GOLDEN); }

LSP_BOTH constexpr void accumulate(uint64_t word, uint64_t key, uint64_t& product, uint64_t& trail) {
  uint64_t x = word ^ key;
  product += (x & 0xFFFFFFFFull) * (x >> 32);
  trail = ((trail << 1) | (trail >> 63)) + word;
}

LSP_BOTH constexpr uint64_t term(uint64_t chunk, int lane, uint64_t product, uint64_t trail) {
  return mix(mix(product + (chunk * LANES + lane + 1) * GOLDEN) ^ trail);
}

LSP_BOTH constexpr uint64_t finish(uint64_t sum, uint64_t length) { return mix(sum ^ (length * GOLDEN)); }

struct Keys {
  uint64_t at[STRIPES][LANES];
};
constexpr Keys make_keys() {
  Keys keys{};
  for (int s = 0; s < STRIPES; ++s)
    for (int l = 0; l < LANES; ++l) keys.at[s][l] = key(s, l);
  return keys;
}

}  // namespace lsp
