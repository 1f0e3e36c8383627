// Paged attention with online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). Where
// blocks of rows are too few for the workers, their splits are computed side by side (FlashDecoding).
#include "attention_block.h"

RIDGELINE_BEGIN

namespace {

int splits_of(const AttentionLaunch& launch, const StepView& step, const RowBlock& block) {
  int splits = 0;
  for (int s = step.segment_begin[block.sequence]; s < step.segment_begin[block.sequence + 1]; ++s) {
    splits += split_count(visible_slots(launch, step, block, s));
  }
  return splits;
}

int64_t units_of(const AttentionLaunch& launch, const StepView& step, int block) {
  return int64_t(splits_of(launch, step, step.blocks[block])) * launch.kv_heads;
}

// One split as a unit of work.
struct SplitUnit {
  int block, kv_head, segment, split;
};

// Units of a block are neighbours, head by head, splits in order.
SplitUnit find_unit(const AttentionLaunch& launch, const StepView& step, int64_t unit) {
  for (int b = 0; b < step.block_count; ++b) {
    const RowBlock& block = step.blocks[b];
    const int splits = splits_of(launch, step, block);
    if (unit >= units_of(launch, step, b)) {
      unit -= units_of(launch, step, b);
      continue;
    }
    int split = int(unit % splits), segment = step.segment_begin[block.sequence];
    for (;; ++segment) {
      const int count = split_count(visible_slots(launch, step, block, segment));
      if (split < count) break;
      split -= count;
    }
    return {b, int(unit / splits), segment, split};
  }
  return {};
}

// The state that a split leaves for the merge. Every unit has room for a whole block of rows.
State partial_state(const AttentionLaunch& launch, Arena& arena) {
  const size_t queries = size_t(kBlockRows) * (launch.heads / launch.kv_heads);
  return arena.take_state(queries, round_up(size_t(launch.head_dim), kGroup));
}

size_t partial_bytes(const AttentionLaunch& launch) {
  Arena arena;
  partial_state(launch, arena);
  return arena.used;
}

State partial_state(const AttentionLaunch& launch, const StepView& step, int64_t unit) {
  Arena arena{reinterpret_cast<uintptr_t>(step.partials) + size_t(unit) * partial_bytes(launch)};
  return partial_state(launch, arena);
}

void run_by_splits(const AttentionLaunch& launch, const StepView& step, int64_t units, const Buffers& buffers,
                   Worker& worker) {
  worker.for_units(units, [&](int64_t unit) {
    const SplitUnit u = find_unit(launch, step, unit);
    BlockTask task(launch, step, step.blocks[u.block], u.kv_head, buffers);
    task.run_split(u.segment, u.split, partial_state(launch, step, unit));
  });
  worker.for_units(int64_t(step.block_count) * launch.kv_heads, [&](int64_t i) {
    const int block = int(i / launch.kv_heads), kv_head = int(i % launch.kv_heads);
    int64_t unit = 0;
    for (int b = 0; b < block; ++b) unit += units_of(launch, step, b);
    const int splits = splits_of(launch, step, step.blocks[block]);
    unit += int64_t(kv_head) * splits;
    BlockTask task(launch, step, step.blocks[block], kv_head, buffers);
    task.clear_total();
    for (int split = 0; split < splits; ++split) task.merge(partial_state(launch, step, unit + split));
    task.write();
  });
}

}  // namespace

size_t attention_scratch_bytes(const AttentionLaunch& launch) {
  Arena arena;
  lay_out(launch, arena);
  return arena.used;
}

void attention(const AttentionLaunch& launch, const StepView& step, Worker& worker) {
  Arena arena{reinterpret_cast<uintptr_t>(worker.scratch)};
  const Buffers buffers = lay_out(launch, arena);
  const int64_t tasks = int64_t(step.block_count) * launch.kv_heads;
  constexpr int64_t kTasksPerWorker = 4;
  if (worker.team->threads() > 1 && tasks < kTasksPerWorker * worker.team->threads()) {
    int64_t units = 0;
    for (int b = 0; b < step.block_count; ++b) units += units_of(launch, step, b);
    if (units > tasks && units * int64_t(partial_bytes(launch)) <= step.partial_bytes) {
      return run_by_splits(launch, step, units, buffers, worker);
    }
  }
  worker.for_units(tasks, [&](int64_t i) {
    // Later blocks of a prompt see more: starting with them leaves small ones for the end.
    const RowBlock& block = step.blocks[step.block_count - 1 - i / launch.kv_heads];
    BlockTask(launch, step, block, int(i % launch.kv_heads), buffers).run();
  });
}

RIDGELINE_END
