// Blocks of GGUF files, taken apart. precision/blocks describes their fields.
#pragma once

#include <cstring>

#include "storage.h"

namespace ridgeline {

struct FileBlock {
  alignas(64) uint8_t codes[kSuperBlock];  // unsigned, before a zero point or a table
  uint8_t scale[2], minimum[2];            // float16; an exponent is the first byte of `scale`
  uint8_t lines[2 * kSuperBlock / 16];     // integer scales of the groups, then their minima
};

// Numbers of kBits bits that lie in planes: in each run of kWidth bytes, byte j holds numbers j, j + kWidth,
// j + 2 * kWidth ... of the run, the first in its lowest bits. They become, or are added as, bits kTo and up.
template <int kBits, int kWidth, int kBytes, int kTo = 0>
RIDGELINE_INLINE void take_planes(const uint8_t* __restrict packed, uint8_t* __restrict out) {
  for (int run = 0; run < kBytes; run += kWidth) {
    for (int shift = 0; shift < 8; shift += kBits) {
      uint8_t* numbers = out + (run * 8 + kWidth * shift) / kBits;
      for (int j = 0; j < kWidth; ++j) {
        const uint8_t bits = uint8_t((packed[run + j] >> shift & ((1 << kBits) - 1)) << kTo);
        numbers[j] = kTo == 0 ? bits : uint8_t(numbers[j] | bits);
      }
    }
  }
}

// The six-bit scales and minima of Q4_K and Q5_K.
RIDGELINE_INLINE void take_sixes(const uint8_t* packed, uint8_t* lines) {
  for (int i = 0; i < 4; ++i) {
    const int first = packed[i], second = packed[4 + i], third = packed[8 + i];
    lines[i] = uint8_t(first & 63);
    lines[4 + i] = uint8_t((third & 15) | first >> 6 << 4);
    lines[8 + i] = uint8_t(second & 63);
    lines[12 + i] = uint8_t(third >> 4 | second >> 6 << 4);
  }
}

// The digits of `places` powers of 3 of `width` bytes.
RIDGELINE_INLINE uint8_t* take_digits(const uint8_t* packed, int width, int places, uint8_t* out) {
  for (int power = 1; places > 0; --places, power *= 3, out += width) {
    for (int j = 0; j < width; ++j) out[j] = uint8_t((packed[j] * power & 255) * 3 >> 8);
  }
  return out;
}

template <Storage kStorage>
RIDGELINE_INLINE void take_codes(const uint8_t* p, uint8_t* codes) {
  using enum Storage;
  if constexpr (kStorage == q4_0 || kStorage == iq4_nl) take_planes<4, 16, 16>(p + 2, codes);
  if constexpr (kStorage == q4_1) take_planes<4, 16, 16>(p + 4, codes);
  if constexpr (kStorage == mxfp4) take_planes<4, 16, 16>(p + 1, codes);
  if constexpr (kStorage == q5_0 || kStorage == q5_1) {
    constexpr int kFields = kStorage == q5_0 ? 2 : 4;
    take_planes<4, 16, 16>(p + kFields + 4, codes);
    take_planes<1, 1, 4, 4>(p + kFields, codes);
  }
  if constexpr (kStorage == q8_0) {
    for (int i = 0; i < kGroup; ++i) codes[i] = p[2 + i] ^ 0x80;  // plus 128
  }
  if constexpr (kStorage == q2_k) take_planes<2, 32, 64>(p + 16, codes);
  if constexpr (kStorage == q3_k) {
    take_planes<2, 32, 64>(p + 32, codes);
    take_planes<1, 32, 32, 2>(p, codes);
  }
  if constexpr (kStorage == q4_k) take_planes<4, 32, 128>(p + 16, codes);
  if constexpr (kStorage == q5_k) {
    take_planes<4, 32, 128>(p + 48, codes);
    take_planes<1, 32, 32, 4>(p + 16, codes);
  }
  if constexpr (kStorage == q6_k) {
    take_planes<4, 64, 128>(p, codes);
    take_planes<2, 32, 64, 4>(p + 128, codes);
  }
  if constexpr (kStorage == iq4_xs) take_planes<4, 16, 128>(p + 8, codes);
  if constexpr (kStorage == tq1_0) {
    codes = take_digits(p, 32, 5, codes);
    codes = take_digits(p + 32, 16, 5, codes);
    take_digits(p + 48, 4, 4, codes);
  }
  if constexpr (kStorage == tq2_0) take_planes<2, 32, 64>(p, codes);
}

template <Storage kStorage>
RIDGELINE_INLINE void take_scales(const uint8_t* p, FileBlock& block) {
  using enum Storage;
  // Where the float16 are: at the start of a block unless its row here says otherwise.
  constexpr int kFields = kStorage == q2_k ? 80 : kStorage == q3_k ? 108 : kStorage == q6_k ? 208
                          : kStorage == tq1_0 ? 52 : kStorage == tq2_0 ? 64 : 0;
  std::memcpy(block.scale, p + kFields, 2);
  std::memcpy(block.minimum, p + kFields + (traits(kStorage).minimum == Minimum::none ? 0 : 2), 2);
  if constexpr (kStorage == q2_k) take_planes<4, 16, 16>(p, block.lines);
  if constexpr (kStorage == q3_k) {
    take_planes<4, 8, 8>(p + 96, block.lines);
    take_planes<2, 4, 4, 4>(p + 104, block.lines);
  }
  if constexpr (kStorage == q4_k || kStorage == q5_k) take_sixes(p + 4, block.lines);
  if constexpr (kStorage == q6_k) std::memcpy(block.lines, p + 192, 16);
  if constexpr (kStorage == iq4_xs) {
    take_planes<4, 1, 4>(p + 4, block.lines);
    take_planes<2, 1, 2, 4>(p + 2, block.lines);
    for (int g = 0; g < kSuperGroups; ++g) block.lines[g] = uint8_t(block.lines[g] - 32);
  }
}

}  // namespace ridgeline
