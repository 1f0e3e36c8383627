// What a block of rows sees of its sequence, and the memory that its attention needs.
#pragma once

#include "../launch.h"
#include "attention.h"

RIDGELINE_BEGIN

namespace {

constexpr int kSplitSlots = 256;

RIDGELINE_INLINE SlotRange clip(SlotRange r, int begin, int end) {
  r.begin = r.begin < begin ? begin : r.begin;
  r.end = r.end > end ? end : r.end;
  return r;
}

// The slots of a segment that a row sees; both ends are 0 if there are none.
RIDGELINE_INLINE SlotRange visible_slots(const AttentionLaunch& launch, const StepView& step, int64_t row,
                                         int segment) {
  const int64_t position = int64_t(step.positions[row]) - step.segment_first_position[segment];
  int64_t begin = launch.window == 0 ? 0 : position - launch.window + 1;
  int64_t end = step.segment_length[segment];
  if (step.segment_causal[segment] && position + 1 < end) end = position + 1;
  begin = begin < 0 ? 0 : begin;
  return begin < end ? SlotRange{int(begin), int(end)} : SlotRange{0, 0};
}

// The range that holds what any of a block's rows sees.
RIDGELINE_INLINE SlotRange visible_slots(const AttentionLaunch& launch, const StepView& step,
                                         const RowBlock& block, int segment) {
  SlotRange all{0, 0};
  for (int i = 0; i < block.row_count; ++i) {
    const SlotRange own = visible_slots(launch, step, block.row_begin + i, segment);
    if (own.begin == own.end) continue;
    if (all.begin == all.end) all = own;
    all = {all.begin < own.begin ? all.begin : own.begin, all.end > own.end ? all.end : own.end};
  }
  return all;
}

// Splits that a range of slots touches.
RIDGELINE_INLINE int split_count(SlotRange slots) {
  return slots.begin == slots.end ? 0 : (slots.end - 1) / kSplitSlots - slots.begin / kSplitSlots + 1;
}

// Running softmax of a block's queries: largest score, sum of weights, weighted sum of values.
struct State {
  float *top, *sum, *o;  // (queries), (queries), (queries, value_stride)
};

// Cuts memory into arrays; at base 0 it only counts.
struct Arena {
  uintptr_t base = 0;
  size_t used = 0;

  template <class T>
  RIDGELINE_MEMBER T* take(size_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += round_up(count * sizeof(T), kLineBytes);
    return p;
  }
  RIDGELINE_MEMBER State take_state(size_t queries, size_t stride) {
    float *top = take<float>(queries), *sum = take<float>(queries);
    return {top, sum, take<float>(queries * stride)};
  }
};

struct Buffers {
  int value_stride;
  Widened widened;
  float *p, *decay, *lanes, *wide_q;
  const float** q;
  const uint16_t** rounded_q;
  SlotRange* visible;
  State split, total;
  uint8_t* path;  // pages of a tile
};

RIDGELINE_INLINE Buffers lay_out(const AttentionLaunch& launch, Arena& arena) {
  Buffers b{};
  b.value_stride = int(round_up(size_t(launch.head_dim), kGroup));
  const size_t queries = size_t(kBlockRows) * (launch.heads / launch.kv_heads),
               stride = size_t(b.value_stride);
  b.widened = {arena.take<float>(kTileSlots * stride), b.value_stride};
  b.p = arena.take<float>(queries * kTileSlots);
  b.decay = arena.take<float>(queries);
  b.lanes = arena.take<float>(queries * 16);
  b.q = arena.take<const float*>(queries);
  b.rounded_q = arena.take<const uint16_t*>(queries);
  b.wide_q = arena.take<float>(launch.rounded_q.data == nullptr ? 0 : queries * stride);
  b.visible = arena.take<SlotRange>(queries);
  b.split = arena.take_state(queries, stride);
  b.total = arena.take_state(queries, stride);
  b.path = arena.take<uint8_t>(kTilePages * page_bytes(launch.pool.format, launch.head_dim));
  return b;
}

}  // namespace

RIDGELINE_END
