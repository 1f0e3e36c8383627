// A tile of slots as a row on a side branch of a tree sees it: the keys and values of its path in the order of
// their positions, in pages of the pool's own layout, so that the same arithmetic runs over them.
#pragma once

#include "../launch.h"
#include "attention.h"

RIDGELINE_BEGIN

namespace {

// The page of a segment's slot, for one head.
RIDGELINE_INLINE uint8_t* page_of(const AttentionLaunch& launch, const StepView& step, int segment, int kv_head,
                                  int slot) {
  const int32_t* table = step.tables + launch.group * step.pages + step.table_begin[segment];
  return launch.pool.head(table[slot / kPageTokens], launch.kv_heads, kv_head, launch.head_dim);
}

struct TilePages {
  const uint8_t* page[kTilePages];
};

// What path_pages needs to know of a row: where it is in the step, and its head.
struct PathRow {
  int64_t row;
  int segment, kv_head;
};

// The pages of the tile that begins at slot `begin`, those that hold `slots` of it. Up to where the path leaves
// the slots in order, they are the pool's; `room` has place for the others, kTilePages pages.
RIDGELINE_INLINE TilePages path_pages(const AttentionLaunch& launch, const StepView& step, const PathRow& at,
                                      int begin, PageRange pages, uint8_t* room) {
  const KvFormat format = launch.pool.format;
  const size_t bytes = page_bytes(format, launch.head_dim);
  const int64_t first = step.segment_first_position[at.segment];
  const int end = begin + pages.end * kPageTokens;
  const int fork = path_fork(step, at.row, first);
  TilePages made{};
  for (int p = pages.begin; p < pages.end; ++p) {
    const int slot = begin + p * kPageTokens;
    made.page[p] = slot < fork ? page_of(launch, step, at.segment, at.kv_head, slot) : nullptr;
    if (slot + kPageTokens <= fork) continue;
    uint8_t* own = room + size_t(p) * bytes;
    if (slot < fork) std::memcpy(own, made.page[p], bytes);
    made.page[p] = own;
  }
  for (int64_t row = at.row; row >= 0; row = step.parents[row]) {
    const int place = int(step.positions[row] - first), slot = step.slots[row];
    if (place < fork || place < begin + pages.begin * kPageTokens) break;
    if (place >= end) continue;
    copy_slot(format, launch.head_dim, page_of(launch, step, at.segment, at.kv_head, slot), slot % kPageTokens,
              room + size_t((place - begin) / kPageTokens) * bytes, place % kPageTokens);
  }
  return made;
}

}  // namespace

RIDGELINE_END
