// Products of a tile of integer codes with rows of A8.
#pragma once

#include "codes.h"

RIDGELINE_BEGIN

template <Storage kStorage>
RIDGELINE_INLINE vint add_dot(vint sum, vint codes, vint x) {
  return traits(kStorage).zero == 128 ? dot_bytes(sum, codes, x) : dot(sum, codes, x);
}

// What the codes' zero point adds to a dot product with a group of activations, or with half of one.
template <Storage kStorage>
RIDGELINE_INLINE vint start_sum(const uint8_t* sum, int half) {
  constexpr Traits kTraits = traits(kStorage);
  constexpr int kZero = kTraits.zero == 128 ? 128 - kByteZero : kTraits.zero;
  if constexpr (kZero == 0) return izero();
  int32_t sums[2];
  std::memcpy(sums, sum, 8);
  return isplat((kTraits.group == 16 ? sums[half] : sums[0] + sums[1]) * -kZero);
}

RIDGELINE_INLINE vfloat splat_sum(const uint8_t* sum) {
  int32_t value;
  std::memcpy(&value, sum, 4);
  return to_float(isplat(value));
}

template <Storage kStorage>
RIDGELINE_INLINE void prefetch_group(const uint8_t* tile, int group) {
  constexpr size_t kBytes = block_bytes(kStorage) / block_groups(kStorage);
  const uint8_t* ahead = tile + size_t(group) * kBytes + kPrefetchBytes;
  for (size_t line = 0; line < kBytes; line += kLineBytes) prefetch(ahead + line);
}

// A group of 32 inputs of a tile, and of the rows that it is multiplied by.
struct GroupInput {
  const uint8_t *scales, *codes;  // of the weights
  const uint8_t* x;               // codes of the first row
  const uint8_t *x_scales, *x_sums, *x_scaled_sums;
  int64_t row_bytes;
};

// sum[t] = the integer products of chunks [kFirst, kFirst + kCount) with row t.
template <Storage kStorage, int kTokens, int kFirst, int kCount>
RIDGELINE_INLINE void multiply_chunks(const GroupInput& in, vint* sum) {
  for (int t = 0; t < kTokens; ++t) {
    sum[t] = start_sum<kStorage>(in.x_sums + t * in.row_bytes, kFirst / kCount);
  }
  unrolled<kCount>([&](auto index) RIDGELINE_INLINED {
    constexpr int kChunk = kFirst + index;
    const vint codes = load_chunk<kStorage, kChunk>(in.codes);
    for (int t = 0; t < kTokens; ++t) {
      const auto* x = reinterpret_cast<const int8_t*>(in.x + t * in.row_bytes);
      sum[t] = add_dot<kStorage>(sum[t], codes, splat_codes(x + 4 * kChunk));
    }
  });
}

// One scale, and minimum, for the 32 inputs.
template <Storage kStorage, int kTokens>
RIDGELINE_INLINE void add_group(const GroupInput& in, vfloat scale, vfloat minimum, vfloat* acc) {
  vint sum[kTokens];
  multiply_chunks<kStorage, kTokens, 0, 8>(in, sum);
  for (int t = 0; t < kTokens; ++t) {
    const vfloat product = to_float(sum[t]), x_scale = splat_at(in.x_scales + t * in.row_bytes);
    if constexpr (traits(kStorage).scale == Scale::exponent) {
      acc[t] = fma(product * x_scale, scale, acc[t]);  // two large scales may be beyond float32
    } else {
      acc[t] = fma(product, scale * x_scale, acc[t]);
    }
    if constexpr (traits(kStorage).minimum != Minimum::none) {
      acc[t] = fma(minimum, splat_at(in.x_scaled_sums + t * in.row_bytes), acc[t]);
    }
  }
}

// Integer scales, and minima, for each half of the group. Both sums are integers below 2**24 and so exact
// (at most 16 * 127 * 32 * 128 for each half, in Q6_K).
template <Storage kStorage, int kTokens>
RIDGELINE_INLINE void add_halves(const GroupInput& in, const SuperBlock<kStorage>& block, int group,
                                 vfloat* acc) {
  vint sum[kTokens];
  vfloat total[kTokens];
  multiply_chunks<kStorage, kTokens, 0, 4>(in, sum);
  const vfloat first = block.scales(2 * group);
  for (int t = 0; t < kTokens; ++t) total[t] = to_float(sum[t]) * first;
  multiply_chunks<kStorage, kTokens, 4, 4>(in, sum);
  const vfloat second = block.scales(2 * group + 1);
  for (int t = 0; t < kTokens; ++t) {
    const int64_t row = t * in.row_bytes;
    vfloat scaled = fma(to_float(sum[t]), second, total[t]) * block.scale;
    if constexpr (traits(kStorage).minimum == Minimum::integer) {
      const vfloat minima = fma(block.minima(2 * group), splat_sum(in.x_sums + row),
                                block.minima(2 * group + 1) * splat_sum(in.x_sums + row + 4));
      scaled = fma(minima, block.minimum, scaled);
    }
    acc[t] = fma(scaled, splat_at(in.x_scales + row), acc[t]);
  }
}

template <Storage kStorage, int kTokens>
RIDGELINE_INLINE void add_group_of_block(GroupInput in, SuperBlock<kStorage>& block, int group, vfloat* acc) {
  constexpr Traits kTraits = traits(kStorage);
  const int index = group % kSuperGroups;
  if (index == 0) block.open(in.scales);
  if constexpr (kTraits.bits == 0) in.codes = block.unpacked + kGroup * kTileRows * index;
  if constexpr (kTraits.group == 16) {
    add_halves<kStorage, kTokens>(in, block, index, acc);
  } else if constexpr (kTraits.group == kSuperBlock) {
    add_group<kStorage, kTokens>(in, block.scale, zero(), acc);
  } else if constexpr (kTraits.minimum == Minimum::integer) {
    add_group<kStorage, kTokens>(in, block.scale * block.scales(index), block.minimum * block.minima(index),
                                 acc);
  } else {
    add_group<kStorage, kTokens>(in, block.scale * block.scales(index), zero(), acc);
  }
}

template <Storage kStorage, int kTokens>
static void quantised_tile(const TileInput& in, float* y) {
  if (in.cols < 1) __builtin_unreachable();  // keeps the accumulators out of memory
  const A8Layout layout = a8_layout(in.cols);
  vfloat acc[kTokens];
  for (int t = 0; t < kTokens; ++t) acc[t] = zero();
  [[maybe_unused]] SuperBlock<kStorage> block;
  for (int g = 0; g < layout.groups; ++g) {
    if constexpr (kTokens >= kPrefetchTokens) prefetch_group<kStorage>(in.tile, g);
    const GroupPlace place = group_place(kStorage, g);
    const uint8_t *scales = in.tile + place.scales, *per_group = in.x + size_t(4) * g;
    const GroupInput group = {scales,
                              in.tile + place.codes,
                              in.x + size_t(kGroup) * g,
                              per_group + layout.scales,
                              in.x + layout.sums + size_t(8) * g,
                              per_group + layout.scaled_sums,
                              in.row_bytes};
    if constexpr (is_super(kStorage)) {
      add_group_of_block<kStorage, kTokens>(group, block, g, acc);
    } else if constexpr (traits(kStorage).minimum == Minimum::half) {
      add_group<kStorage, kTokens>(group, load_scales<kStorage>(scales),
                                   load_scales<kStorage>(scales + 2 * kTileRows), acc);
    } else {
      add_group<kStorage, kTokens>(group, load_scales<kStorage>(scales), zero(), acc);
    }
  }
  for (int t = 0; t < kTokens; ++t) store(y + t * kResultStride, acc[t]);
}

RIDGELINE_END
