// The noise of execution/noise.py, which says what it is, by token.
#pragma once

#include <math.h>

#include <cstring>

#include "simd.h"

RIDGELINE_BEGIN

constexpr int kNoiseBits = 24;
constexpr int kNoiseTokens = 8;  // tokens that share a block of the generator

// What a row's noise is addressed by.
struct NoiseAddress {
  uint64_t seed, position, choice;
};

// The 24-bit numbers of the tokens of `kBlocks` blocks from `block` on, 8 each: Philox4x64-10. Two blocks at a time
// take little longer than one, whose multiplications wait for each other.
template <int kBlocks>
RIDGELINE_INLINE void noise_bits(const NoiseAddress& address, uint64_t block, uint32_t* numbers) {
  uint64_t c[kBlocks][4], k[2] = {address.seed, 0};
  for (int b = 0; b < kBlocks; ++b) {
    c[b][0] = 1 + block + uint64_t(b);
    c[b][1] = address.position;
    c[b][2] = address.choice;
    c[b][3] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int b = 0; b < kBlocks; ++b) {
      const unsigned __int128 first = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c[b][0];
      const unsigned __int128 second = static_cast<unsigned __int128>(0xCA5A826395121157u) * c[b][2];
      c[b][0] = uint64_t(second >> 64) ^ c[b][1] ^ k[0];
      c[b][2] = uint64_t(first >> 64) ^ c[b][3] ^ k[1];
      c[b][1] = uint64_t(second);
      c[b][3] = uint64_t(first);
    }
    k[0] += 0x9E3779B97F4A7C15u;
    k[1] += 0xBB67AE8584CAA73Bu;
  }
  for (int i = 0; i < 4 * kBlocks; ++i) {
    numbers[2 * i] = uint32_t(c[i / 4][i % 4]) >> (32 - kNoiseBits);
    numbers[2 * i + 1] = uint32_t(c[i / 4][i % 4] >> 32) >> (32 - kNoiseBits);
  }
}

// Standard Gumbel noise on a grid, so that it does not depend on how a library rounds its logarithm.
RIDGELINE_INLINE float gumbel(uint32_t number) {
  constexpr double kGrid = 1 << 20;
  const double uniform = (double(number) + 0.5) * 0x1p-24;
  return float(__builtin_rint(-log(-log(uniform)) * kGrid) / kGrid);
}

// Upper bounds of the noise by number; no logarithm is taken of what cannot win with its bound.
struct NoiseBounds {
  static constexpr uint32_t kUsual = (1u << kNoiseBits) - (1u << 16), kRare = (1u << kNoiseBits) - (1u << 8);
  float usual, rare, most;

  static NoiseBounds make() {
    return {gumbel(kUsual), gumbel(kRare), gumbel((1u << kNoiseBits) - 1)};
  }
  float of(uint32_t number) const {
    return number <= kUsual ? usual : number <= kRare ? rare : most;
  }
};

RIDGELINE_END
