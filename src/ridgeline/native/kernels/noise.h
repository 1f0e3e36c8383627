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

// The 24-bit numbers of tokens 8 * block to 8 * block + 7: Philox4x64-10.
RIDGELINE_INLINE void noise_bits(const NoiseAddress& address, uint64_t block, uint32_t (&numbers)[kNoiseTokens]) {
  uint64_t c[4] = {1 + block, address.position, address.choice, 0}, k[2] = {address.seed, 0};
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 first = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c[0];
    const unsigned __int128 second = static_cast<unsigned __int128>(0xCA5A826395121157u) * c[2];
    c[0] = uint64_t(second >> 64) ^ c[1] ^ k[0];
    c[2] = uint64_t(first >> 64) ^ c[3] ^ k[1];
    c[1] = uint64_t(second);
    c[3] = uint64_t(first);
    k[0] += 0x9E3779B97F4A7C15u;
    k[1] += 0xBB67AE8584CAA73Bu;
  }
  for (int i = 0; i < 4; ++i) {
    numbers[2 * i] = uint32_t(c[i]) >> (32 - kNoiseBits);
    numbers[2 * i + 1] = uint32_t(c[i] >> 32) >> (32 - kNoiseBits);
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
