// Products of a pair of tiles of 16 output rows with up to kMaxTokens rows of activations.
// The order of the float accumulation is that of the input groups, whatever the number of rows.
#pragma once

#include "bf16_tile.h"
#include "float_tile.h"
#include "panel_tile.h"

RIDGELINE_BEGIN

// y[t][0..31] = both tiles times row t; 1 <= tokens <= kMaxTokens. Where there is one tile, y[t][16..31] may be
// anything. Storages are spread over several files, which compile side by side; multiply_tiles is for all.
void multiply_tiles(Storage storage, const TileInput& in, int tokens, float* y);
void multiply_groups_tiles(Storage storage, const TileInput& in, int tokens, float* y);
void multiply_k_tiles(Storage storage, const TileInput& in, int tokens, float* y);
void multiply_super_tiles(Storage storage, const TileInput& in, int tokens, float* y);

// Of more than kMaxTokens rows and a storage that has panels (panel_tile.h).
void multiply_panels(Storage storage, const TileInput& in, int rows, float* y);
void multiply_groups_panels(Storage storage, const TileInput& in, int rows, float* y);
void multiply_k_panels(Storage storage, const TileInput& in, int rows, float* y);
void multiply_super_panels(Storage storage, const TileInput& in, int rows, float* y);

template <Storage kStorage, int kTiles, int kTokens>
RIDGELINE_INLINE void one_kernel(const TileInput& in, float* y) {
  if constexpr (is_quantised(kStorage)) return quantised_tiles<kStorage, kTiles, kTokens>(in, y);
  if constexpr (kStorage == Storage::bf16) return bf16_tiles<kTiles, kTokens>(in, y);
  return float_tiles<kTiles, kTokens>(in, y);
}

// Both tiles at once, or one after the other.
template <Storage kStorage, int kTokens>
RIDGELINE_INLINE void multiply_pair(TileInput in, float* y) {
  constexpr int kTiles = tiles_at_once(kStorage, kTokens);
  one_kernel<kStorage, kTiles, kTokens>(in, y);
  if (kTiles == 2 || in.tiles() == 1) return;
  in.tile += in.next_tile;
  one_kernel<kStorage, kTiles, kTokens>(in, y + kTileRows);
}

// Tiles of one of kStorages.
template <Storage... kStorages>
RIDGELINE_INLINE void multiply_tiles_of(Storage storage, const TileInput& in, int tokens, float* y) {
  unrolled<kMaxTokens>([&](auto index) RIDGELINE_INLINED {
    constexpr int kTokens = index + 1;
    if (tokens != kTokens) return;
    ((storage == kStorages ? multiply_pair<kStorages, kTokens>(in, y) : void()), ...);
  });
}

template <Storage... kStorages>
RIDGELINE_INLINE void multiply_panels_of(Storage storage, const TileInput& in, int rows, float* y) {
  ((storage == kStorages ? storage_panels<kStorages>(in, rows, y) : void()), ...);
}

RIDGELINE_END
