// Products of tiles of integer codes with rows of A8.
#pragma once

#include "codes.h"

RIDGELINE_BEGIN

template <Storage kStorage>
RIDGELINE_INLINE vint add_dot(vint sum, vint codes, vint x) {
  return traits(kStorage).zero == 128 ? dot_bytes(sum, codes, x) : dot(sum, codes, x);
}

RIDGELINE_INLINE constexpr bool has_halves(Storage s) { return is_quantised(s) && traits(s).group == 16; }

// What dot products take each code to be larger by than it is.
RIDGELINE_INLINE constexpr int code_zero(Storage s) {
  return traits(s).zero == 128 ? 128 - kByteZero : traits(s).zero;
}

// Whether codes lie as they do in memory, or a byte each as panel_tile.h unpacks them.
enum class Codes { packed, bytes };

// What the codes' zero point adds to a dot product with a group of activations, or with half of one.
// It lies instead of the sums, already multiplied, where starts_unpacked.
RIDGELINE_INLINE constexpr bool starts_unpacked(Storage s, Codes codes) {
  return codes == Codes::bytes && has_halves(s) && code_zero(s) != 0;
}
template <Storage kStorage, Codes kCodes>
RIDGELINE_INLINE vint start_sum(const uint8_t* sum, int half) {
  constexpr int kZero = code_zero(kStorage);
  if constexpr (kZero == 0) return izero();
  int32_t sums[2];
  std::memcpy(sums, sum, 8);
  if constexpr (starts_unpacked(kStorage, kCodes)) return isplat(sums[half]);
  return isplat((traits(kStorage).group == 16 ? sums[half] : sums[0] + sums[1]) * -kZero);
}

RIDGELINE_INLINE vfloat splat_sum(const uint8_t* sum) {
  int32_t value;
  std::memcpy(&value, sum, 4);
  return to_float(isplat(value));
}

// Tiles that are multiplied side by side: two share each load of an activation. With few rows the memory is the
// limit, and it is read fastest in one stream; scales for each half of a group need too many registers.
RIDGELINE_INLINE constexpr int tiles_at_once(Storage s, int tokens) {
  return has_halves(s) || tokens <= kFewTokens ? 1 : kMaxTiles;
}

// A group of 32 inputs of a tile, and of the rows that it is multiplied by.
struct GroupWeights {
  const uint8_t *scales, *codes;
};
struct GroupRows {
  const uint8_t* codes;  // of the first row
  const uint8_t *scales, *sums, *scaled_sums;
  int64_t row_bytes, sum_bytes;  // from row to row, of the sums where they lie apart
};

RIDGELINE_INLINE GroupRows rows_of_group(const uint8_t* x, int64_t row_bytes, const A8Layout& layout,
                                         int group) {
  const uint8_t* per_group = x + size_t(4) * group;
  return {x + size_t(kGroup) * group, per_group + layout.scales, x + layout.sums + size_t(8) * group,
          per_group + layout.scaled_sums, row_bytes, row_bytes};
}

template <Storage kStorage, Codes kCodes, int kChunk>
RIDGELINE_INLINE vint chunk_of(const uint8_t* group) {
  if constexpr (kCodes == Codes::bytes) return iload(group + kLineBytes * kChunk);
  return load_chunk<kStorage, kChunk>(group);
}

// sum[i][t] = the integer products of chunks [kFirst, kFirst + kCount) of tile i with row t.
template <Storage kStorage, Codes kCodes, int kTiles, int kTokens, int kFirst, int kCount>
RIDGELINE_INLINE void multiply_chunks(const GroupWeights* w, const GroupRows& x,
                                      vint (&sum)[kTiles][kTokens]) {
  for (int t = 0; t < kTokens; ++t) {
    const vint start = start_sum<kStorage, kCodes>(x.sums + t * x.sum_bytes, kFirst / kCount);
    for (int i = 0; i < kTiles; ++i) sum[i][t] = start;
  }
  unrolled<kCount>([&](auto index) RIDGELINE_INLINED {
    constexpr int kChunk = kFirst + index;
    vint codes[kTiles];
    for (int i = 0; i < kTiles; ++i) codes[i] = chunk_of<kStorage, kCodes, kChunk>(w[i].codes);
    for (int t = 0; t < kTokens; ++t) {
      const vint four =
          splat_codes(reinterpret_cast<const int8_t*>(x.codes + t * x.row_bytes) + 4 * kChunk);
      for (int i = 0; i < kTiles; ++i) sum[i][t] = add_dot<kStorage>(sum[i][t], codes[i], four);
    }
  });
}

// One scale, and minimum, for the 32 inputs of each tile.
struct GroupScales {
  vfloat scale, minimum;
};
template <Storage kStorage, Codes kCodes, int kTiles, int kTokens>
RIDGELINE_INLINE void add_group(const GroupWeights* w, const GroupRows& x, const GroupScales* scales,
                                vfloat (&acc)[kTiles][kTokens]) {
  vint sum[kTiles][kTokens];
  multiply_chunks<kStorage, kCodes, kTiles, kTokens, 0, 8>(w, x, sum);
  for (int t = 0; t < kTokens; ++t) {
    const vfloat x_scale = splat_at(x.scales + t * x.row_bytes);
    for (int i = 0; i < kTiles; ++i) {
      const vfloat product = to_float(sum[i][t]);
      if constexpr (traits(kStorage).scale == Scale::exponent) {
        // Two large scales may be beyond float32.
        acc[i][t] = fma(product * x_scale, scales[i].scale, acc[i][t]);
      } else {
        acc[i][t] = fma(product, scales[i].scale * x_scale, acc[i][t]);
      }
    }
    if constexpr (traits(kStorage).minimum != Minimum::none) {
      const vfloat x_sum = splat_at(x.scaled_sums + t * x.row_bytes);
      for (int i = 0; i < kTiles; ++i) acc[i][t] = fma(scales[i].minimum, x_sum, acc[i][t]);
    }
  }
}

// Integer scales, and minima, for each half of the group, of blocks that are a SuperBlock or a PanelBlock. Both
// sums are integers below 2**24 and so exact (at most 16 * 127 * 32 * 128 for each half, in Q6_K).
template <Storage kStorage, Codes kCodes, int kTiles, int kTokens, class Block>
RIDGELINE_INLINE void add_halves(const GroupWeights* w, const GroupRows& x, const Block* block, int group,
                                  vfloat (&acc)[kTiles][kTokens]) {
  vint sum[kTiles][kTokens];
  vfloat total[kTiles][kTokens];
  multiply_chunks<kStorage, kCodes, kTiles, kTokens, 0, 4>(w, x, sum);
  for (int i = 0; i < kTiles; ++i) {
    const vfloat first = block[i].scales(2 * group);
    for (int t = 0; t < kTokens; ++t) total[i][t] = to_float(sum[i][t]) * first;
  }
  multiply_chunks<kStorage, kCodes, kTiles, kTokens, 4, 4>(w, x, sum);
  for (int i = 0; i < kTiles; ++i) {
    const vfloat second = block[i].scales(2 * group + 1);
    for (int t = 0; t < kTokens; ++t) {
      const int64_t row = t * x.row_bytes;
      vfloat scaled = fma(to_float(sum[i][t]), second, total[i][t]) * block[i].scale;
      if constexpr (traits(kStorage).minimum == Minimum::integer) {
        const vfloat minima = fma(block[i].minima(2 * group), splat_sum(x.sums + row),
                                  block[i].minima(2 * group + 1) * splat_sum(x.sums + row + 4));
        scaled = fma(minima, block[i].minimum, scaled);
      }
      acc[i][t] = fma(scaled, splat_at(x.scales + row), acc[i][t]);
    }
  }
}

// Opens the block that a group begins, finds the group's codes, and returns the scales of all its inputs, where
// they share them.
template <Storage kStorage>
RIDGELINE_INLINE GroupScales open_group(const uint8_t* tile, int group, SuperBlock<kStorage>& block,
                                        GroupWeights& w) {
  constexpr Traits kTraits = traits(kStorage);
  const GroupPlace place = group_place(kStorage, group);
  const int index = group % kSuperGroups;
  GroupScales s;
  w = {tile + place.scales, tile + place.codes};
  if constexpr (!is_super(kStorage)) {
    s.scale = load_scales<kStorage>(w.scales);
    if constexpr (kTraits.minimum == Minimum::half)
      s.minimum = load_scales<kStorage>(w.scales + 2 * kTileRows);
  } else {
    if (index == 0) block.open(w.scales);
    if constexpr (kTraits.bits == 0) w.codes = block.unpacked + kGroup * kTileRows * index;
    s.scale = block.scale;
    if constexpr (kTraits.group == kGroup) s.scale = s.scale * block.scales(index);
    if constexpr (kTraits.group == kGroup && kTraits.minimum == Minimum::integer) {
      s.minimum = block.minimum * block.minima(index);
    }
  }
  return s;
}

template <int kTiles, int kTokens>
RIDGELINE_INLINE void store_results(const vfloat (&acc)[kTiles][kTokens], float* y) {
  for (int i = 0; i < kTiles; ++i) {
    for (int t = 0; t < kTokens; ++t) store(y + t * kResultStride + i * kTileRows, acc[i][t]);
  }
}

template <Storage kStorage, int kTiles, int kTokens>
static void quantised_tiles(const TileInput& in, float* y) {
  if (in.cols < 1) __builtin_unreachable();  // keeps the accumulators out of memory
  Fetching<kTiles, int(block_bytes(kStorage) / block_groups(kStorage))> fetching(in);
  const A8Layout layout = a8_layout(in.cols);
  vfloat acc[kTiles][kTokens];
  for (int i = 0; i < kTiles; ++i) {
    for (int t = 0; t < kTokens; ++t) acc[i][t] = zero();
  }
  SuperBlock<kStorage> block[kTiles];
  for (int g = 0; g < layout.groups; ++g) {
    fetching.fetch();
    GroupWeights w[kTiles];
    GroupScales scales[kTiles];
    for (int i = 0; i < kTiles; ++i) {
      scales[i] = open_group<kStorage>(in.tile + i * in.next_tile, g, block[i], w[i]);
    }
    const GroupRows x = rows_of_group(in.x, in.row_bytes, layout, g);
    if constexpr (has_halves(kStorage)) {
      add_halves<kStorage, Codes::packed, kTiles, kTokens>(w, x, block, g % kSuperGroups, acc);
    } else {
      add_group<kStorage, Codes::packed, kTiles, kTokens>(w, x, scales, acc);
    }
  }
  store_results(acc, y);
}

RIDGELINE_END
