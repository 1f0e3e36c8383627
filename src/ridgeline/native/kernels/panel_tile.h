// Products of many rows with tiles whose codes are costly to unpack: 256 inputs of a pair of tiles at a time are
// unpacked once, into the first-level cache, for all rows. Each row's order of accumulation is that of
// quantised_tile.h.
#pragma once

#include "quantised_tile.h"

RIDGELINE_BEGIN

// Whether codes are four bits that are what they stand for: few operations, which some cores do beside the products.
RIDGELINE_INLINE constexpr bool unpacks_easily(Storage s) {
  const Traits t = traits(s);
  return !is_super(s) && t.levels == Levels::linear && t.bits == 4;
}

// Codes of a byte need no unpacking, unless their scales do.
RIDGELINE_INLINE constexpr bool has_panels(Storage s) {
  const Traits t = traits(s);
  if (unpacks_easily(s)) return kMaxTiles > 1;
  return is_quantised(s) && (is_super(s) || t.levels != Levels::linear || t.bits != 8);
}

// Rows in a register tile. Scales for each half of a group need half as many registers again.
RIDGELINE_INLINE constexpr int panel_tokens(Storage s) {
  return has_halves(s) && kMaxTiles > 1 ? kMaxTokens * 2 / 3 : kMaxTokens;
}

// Up to 256 inputs of a tile: codes of a byte, and the scales and minima of each group, or half of one.
template <Storage kStorage>
struct PanelBlock {
  static constexpr int kParts = kSuperGroups * (has_halves(kStorage) ? 2 : 1);

  vfloat scale, minimum;  // of halves: what their integer scales and minima are multiplied by
  alignas(64) float scale_lines[kParts * kTileRows], minimum_lines[kParts * kTileRows];
  alignas(64) uint8_t codes[kSuperBlock * kTileRows];

  RIDGELINE_MEMBER vfloat scales(int part) const { return load(scale_lines + kTileRows * part); }
  RIDGELINE_MEMBER vfloat minima(int part) const { return load(minimum_lines + kTileRows * part); }

  // Groups [first, first + count) of a tile, the first of which begins a block.
  RIDGELINE_MEMBER void unpack(const uint8_t* tile, int first, int count) {
    constexpr Minimum kMinimum = traits(kStorage).minimum;
    SuperBlock<kStorage> block;
    for (int g = 0; g < count; ++g) {
      GroupWeights w;
      const GroupScales s = open_group<kStorage>(tile, first + g, block, w);
      if constexpr (has_halves(kStorage)) {
        for (int part = 2 * g; part < 2 * g + 2; ++part) {
          store(scale_lines + kTileRows * part, block.scales(part));
          if constexpr (kMinimum == Minimum::integer)
            store(minimum_lines + kTileRows * part, block.minima(part));
        }
      } else {
        store(scale_lines + kTileRows * g, s.scale);
        if constexpr (kMinimum != Minimum::none) store(minimum_lines + kTileRows * g, s.minimum);
      }
      unrolled<kChunks>([&](auto chunk) RIDGELINE_INLINED {
        istore(codes + kLineBytes * (kChunks * g + chunk), load_chunk<kStorage, chunk>(w.codes));
      });
    }
    if constexpr (has_halves(kStorage)) {
      scale = block.scale;
      minimum = block.minimum;
    }
  }
  static constexpr int kChunks = 8;  // of a group
};

// Where the lines of a row of activations lie that a panel is multiplied by.
struct PanelLines {
  int64_t places[kSuperGroups];

  PanelLines(const A8Layout& layout, int first) {
    const int64_t codes = int64_t(kGroup) * first, per_group = int64_t(4) * first;
    for (int i = 0; i < 4; ++i) places[i] = codes + int64_t(kLineBytes) * i;
    places[4] = int64_t(layout.scales) + per_group;
    places[5] = int64_t(layout.sums) + 2 * per_group;
    places[6] = places[5] + int64_t(kLineBytes) - 4;
    places[7] = int64_t(layout.scaled_sums) + per_group;
  }
};

// A panel of a pair of tiles and what it is multiplied by: groups [first, first + groups) of some rows. What to
// fetch meanwhile: for each register tile of rows, `next_bytes` of each tile of the next panel.
template <Storage kStorage>
struct PanelInput {
  const PanelBlock<kStorage>* block;
  const uint8_t* x;  // of the first row, all inputs
  int64_t row_bytes;
  const A8Layout& layout;
  int first, groups;
  PanelLines lines;
  const uint8_t* next;
  int64_t next_tile;
  int next_bytes;
};

// Adds the panel's products with kTokens rows to y, and fetches what the next rows have of it.
template <Storage kStorage, int kTokens>
RIDGELINE_INLINE void add_panel_rows(const PanelInput<kStorage>& in, const uint8_t* row, float* y) {
  if (in.groups < 1) __builtin_unreachable();
  vfloat acc[kMaxTiles][kTokens];
  for (int i = 0; i < kMaxTiles; ++i) {
    for (int t = 0; t < kTokens; ++t) acc[i][t] = load(y + t * kResultStride + i * kTileRows);
  }
  GroupRows x = rows_of_group(row, in.row_bytes, in.layout, in.first);
  alignas(64) uint8_t starts[kTokens * kLineBytes];
  if constexpr (starts_unpacked(kStorage, Codes::bytes)) {
    const vint zero_point = isplat(-code_zero(kStorage));
    for (int t = 0; t < kTokens; ++t)
      istore(starts + kLineBytes * t, multiply(iload(x.sums + t * in.row_bytes), zero_point));
    x.sums = starts;
    x.sum_bytes = kLineBytes;
  }
  for (int g = 0; g < in.groups; ++g) {
    const uint8_t* ahead = row + kTokens * in.row_bytes + in.lines.places[g];
    for (int t = 0; t < kTokens; ++t) prefetch_near(ahead + t * in.row_bytes);
    GroupWeights w[kMaxTiles];
    for (int i = 0; i < kMaxTiles; ++i) w[i] = {nullptr, in.block[i].codes + kGroup * kTileRows * g};
    if constexpr (has_halves(kStorage)) {
      add_halves<kStorage, Codes::bytes, kMaxTiles, kTokens>(w, x, in.block, g, acc);
    } else {
      GroupScales scales[kMaxTiles];
      for (int i = 0; i < kMaxTiles; ++i) {
        scales[i].scale = in.block[i].scales(g);
        if constexpr (traits(kStorage).minimum != Minimum::none) scales[i].minimum = in.block[i].minima(g);
      }
      add_group<kStorage, Codes::bytes, kMaxTiles, kTokens>(w, x, scales, acc);
    }
    x.codes += kGroup;
    x.scales += 4;
    x.sums += 8;
    x.scaled_sums += 4;
  }
  store_results(acc, y);
}

// Adds the products with rows [begin, end), kTokens at a time.
template <Storage kStorage, int kTokens>
static __attribute__((noinline)) void add_panel(const PanelInput<kStorage>& in, int begin, int end,
                                                float* y) {
  const uint8_t* next = in.next + begin / kTokens * in.next_bytes;
  for (int row = begin; row < end; row += kTokens, next += in.next_bytes) {
    for (int byte = 0; byte < in.next_bytes; byte += int(kLineBytes)) {
      for (int i = 0; i < kMaxTiles; ++i) prefetch(next + byte + i * in.next_tile);
    }
    add_panel_rows<kStorage, kTokens>(in, in.x + row * in.row_bytes, y + row * kResultStride);
  }
}

// y[row][0..31] = a pair of tiles times each of `rows` rows, of which there are more than kMaxTokens.
template <Storage kStorage>
static void storage_panels(const TileInput& in, int rows, float* y) {
  constexpr int kMost = panel_tokens(kStorage);
  const A8Layout layout = a8_layout(in.cols);
  // Register tiles of `tokens` rows, and before them some of one row more.
  const int tiles = (rows + kMost - 1) / kMost, tokens = rows / tiles, larger = rows % tiles * (tokens + 1);
  const int next_bytes = int(round_up(block_bytes(kStorage) / size_t(tiles) + 1, kLineBytes));
  for (int i = 0; i < rows * kResultStride; i += kTileRows) store(y + i, zero());
  PanelBlock<kStorage> block[kMaxTiles];
  for (int tile = 0; tile < in.tiles(); tile += kMaxTiles) {
    const uint8_t* weights = in.tile + tile * in.next_tile;
    float* out = y + tile * kTileRows;
    for (int first = 0; first < layout.groups; first += kSuperGroups) {
      const int groups = layout.groups - first < kSuperGroups ? layout.groups - first : kSuperGroups;
      for (int i = 0; i < kMaxTiles; ++i) block[i].unpack(weights + i * in.next_tile, first, groups);
      const uint8_t* next = weights + group_place(kStorage, first + kSuperGroups).scales;
      const PanelInput<kStorage> panel = {block, in.x, in.row_bytes, layout, first, groups,
                                          PanelLines(layout, first), next, in.next_tile, next_bytes};
      unrolled<kMost - kMost / 2 + 1>([&](auto index) RIDGELINE_INLINED {
        constexpr int kTokens = kMost / 2 + index;
        if (tokens + 1 == kTokens) add_panel<kStorage, kTokens>(panel, 0, larger, out);
        if (tokens == kTokens) add_panel<kStorage, kTokens>(panel, larger, rows, out);
      });
    }
  }
}

RIDGELINE_END
