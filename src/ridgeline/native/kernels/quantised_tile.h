// Products of tiles of integer codes with rows of A8.
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

template <Storage kStorage, int kTiles>
RIDGELINE_INLINE void prefetch_group(const TileInput& in, int group) {
  constexpr size_t kBytes = block_bytes(kStorage) / block_groups(kStorage);
  const uint8_t* ahead = in.tile + prefetch_place<kTiles>(in, size_t(group) * kBytes);
  for (int i = 0; i < kTiles; ++i) {
    for (size_t line = 0; line < kBytes; line += kLineBytes) prefetch(ahead + i * in.next_tile + line);
  }
}

// Tiles that are multiplied side by side: two share each load of an activation. With few rows the memory is the
// limit, and it is read fastest in one stream; scales for each half of a group need too many registers.
RIDGELINE_INLINE constexpr int tiles_at_once(Storage s, int tokens) {
  const bool halves = is_quantised(s) && traits(s).group == 16;
  return halves || tokens < kPrefetchTokens ? 1 : kMaxTiles;
}

// A group of 32 inputs of a tile, and of the rows that it is multiplied by.
struct GroupWeights {
  const uint8_t *scales, *codes;
};
struct GroupRows {
  const uint8_t* codes;  // of the first row
  const uint8_t *scales, *sums, *scaled_sums;
  int64_t row_bytes;
};

// sum[i][t] = the integer products of chunks [kFirst, kFirst + kCount) of tile i with row t.
template <Storage kStorage, int kTiles, int kTokens, int kFirst, int kCount>
RIDGELINE_INLINE void multiply_chunks(const GroupWeights* w, const GroupRows& x, vint (&sum)[kTiles][kTokens]) {
  for (int t = 0; t < kTokens; ++t) {
    const vint start = start_sum<kStorage>(x.sums + t * x.row_bytes, kFirst / kCount);
    for (int i = 0; i < kTiles; ++i) sum[i][t] = start;
  }
  unrolled<kCount>([&](auto index) RIDGELINE_INLINED {
    constexpr int kChunk = kFirst + index;
    vint codes[kTiles];
    for (int i = 0; i < kTiles; ++i) codes[i] = load_chunk<kStorage, kChunk>(w[i].codes);
    for (int t = 0; t < kTokens; ++t) {
      const vint four =
          splat_codes(reinterpret_cast<const int8_t*>(x.codes + t * x.row_bytes) + 4 * kChunk);
      for (int i = 0; i < kTiles; ++i) sum[i][t] = add_dot<kStorage>(sum[i][t], codes[i], four);
    }
  });
}

// One scale, and minimum, for the 32 inputs of each tile.
template <Storage kStorage, int kTiles, int kTokens>
RIDGELINE_INLINE void add_group(const GroupWeights* w, const GroupRows& x, const vfloat* scale,
                                const vfloat* minimum, vfloat (&acc)[kTiles][kTokens]) {
  vint sum[kTiles][kTokens];
  multiply_chunks<kStorage, kTiles, kTokens, 0, 8>(w, x, sum);
  for (int t = 0; t < kTokens; ++t) {
    const vfloat x_scale = splat_at(x.scales + t * x.row_bytes);
    for (int i = 0; i < kTiles; ++i) {
      const vfloat product = to_float(sum[i][t]);
      if constexpr (traits(kStorage).scale == Scale::exponent) {
        acc[i][t] = fma(product * x_scale, scale[i], acc[i][t]);  // two large scales may be beyond float32
      } else {
        acc[i][t] = fma(product, scale[i] * x_scale, acc[i][t]);
      }
    }
    if constexpr (traits(kStorage).minimum != Minimum::none) {
      const vfloat x_sum = splat_at(x.scaled_sums + t * x.row_bytes);
      for (int i = 0; i < kTiles; ++i) acc[i][t] = fma(minimum[i], x_sum, acc[i][t]);
    }
  }
}

// Integer scales, and minima, for each half of the group. Both sums are integers below 2**24 and so exact
// (at most 16 * 127 * 32 * 128 for each half, in Q6_K).
template <Storage kStorage, int kTokens>
RIDGELINE_INLINE void add_halves(const GroupWeights& w, const GroupRows& x, const SuperBlock<kStorage>& block,
                                 int group, vfloat (&acc)[kTokens]) {
  vint sum[1][kTokens];
  vfloat total[kTokens];
  multiply_chunks<kStorage, 1, kTokens, 0, 4>(&w, x, sum);
  const vfloat first = block.scales(2 * group);
  for (int t = 0; t < kTokens; ++t) total[t] = to_float(sum[0][t]) * first;
  multiply_chunks<kStorage, 1, kTokens, 4, 4>(&w, x, sum);
  const vfloat second = block.scales(2 * group + 1);
  for (int t = 0; t < kTokens; ++t) {
    const int64_t row = t * x.row_bytes;
    vfloat scaled = fma(to_float(sum[0][t]), second, total[t]) * block.scale;
    if constexpr (traits(kStorage).minimum == Minimum::integer) {
      const vfloat minima = fma(block.minima(2 * group), splat_sum(x.sums + row),
                                block.minima(2 * group + 1) * splat_sum(x.sums + row + 4));
      scaled = fma(minima, block.minimum, scaled);
    }
    acc[t] = fma(scaled, splat_at(x.scales + row), acc[t]);
  }
}

template <Storage kStorage, int kTiles, int kTokens>
RIDGELINE_INLINE void add_group_of_block(GroupWeights* w, const GroupRows& x,
                                         SuperBlock<kStorage> (&block)[kTiles], int group,
                                         vfloat (&acc)[kTiles][kTokens]) {
  constexpr Traits kTraits = traits(kStorage);
  const int index = group % kSuperGroups;
  vfloat scale[kTiles], minimum[kTiles];
  for (int i = 0; i < kTiles; ++i) {
    if (index == 0) block[i].open(w[i].scales);
    if constexpr (kTraits.bits == 0) w[i].codes = block[i].unpacked + kGroup * kTileRows * index;
    scale[i] = block[i].scale;
    if constexpr (kTraits.group == kGroup) scale[i] = scale[i] * block[i].scales(index);
    if constexpr (kTraits.group == kGroup && kTraits.minimum == Minimum::integer) {
      minimum[i] = block[i].minimum * block[i].minima(index);
    }
  }
  if constexpr (kTraits.group == 16) {
    add_halves<kStorage, kTokens>(w[0], x, block[0], index, acc[0]);
  } else {
    add_group<kStorage, kTiles, kTokens>(w, x, scale, minimum, acc);
  }
}

template <Storage kStorage, int kTiles, int kTokens>
static void quantised_tiles(const TileInput& in, float* y) {
  if (in.cols < 1) __builtin_unreachable();  // keeps the accumulators out of memory
  const A8Layout layout = a8_layout(in.cols);
  vfloat acc[kTiles][kTokens];
  for (int i = 0; i < kTiles; ++i) {
    for (int t = 0; t < kTokens; ++t) acc[i][t] = zero();
  }
  [[maybe_unused]] SuperBlock<kStorage> block[kTiles];
  for (int g = 0; g < layout.groups; ++g) {
    const GroupPlace place = group_place(kStorage, g);
    if constexpr (kTokens >= kPrefetchTokens) prefetch_group<kStorage, kTiles>(in, g);
    GroupWeights w[kTiles];
    for (int i = 0; i < kTiles; ++i) {
      const uint8_t* tile = in.tile + i * in.next_tile;
      w[i] = {tile + place.scales, tile + place.codes};
    }
    const uint8_t* per_group = in.x + size_t(4) * g;
    const GroupRows x = {in.x + size_t(kGroup) * g, per_group + layout.scales,
                         in.x + layout.sums + size_t(8) * g, per_group + layout.scaled_sums, in.row_bytes};
    if constexpr (is_super(kStorage)) {
      add_group_of_block<kStorage, kTiles, kTokens>(w, x, block, g, acc);
    } else {
      vfloat scale[kTiles], minimum[kTiles];
      for (int i = 0; i < kTiles; ++i) {
        scale[i] = load_scales<kStorage>(w[i].scales);
        if constexpr (traits(kStorage).minimum == Minimum::half)
          minimum[i] = load_scales<kStorage>(w[i].scales + 2 * kTileRows);
      }
      add_group<kStorage, kTiles, kTokens>(w, x, scale, minimum, acc);
    }
  }
  for (int i = 0; i < kTiles; ++i) {
    for (int t = 0; t < kTokens; ++t) store(y + t * kResultStride + i * kTileRows, acc[i][t]);
  }
}

RIDGELINE_END
