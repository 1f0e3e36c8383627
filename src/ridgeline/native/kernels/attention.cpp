// Paged attention with online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). Where
// blocks of rows are too few for the workers, their rows are cut into pieces, and their splits are computed side by
// side (FlashDecoding).
#include "attention_block.h"

RIDGELINE_BEGIN

namespace {

constexpr int kMaxPieces = 4;  // of a block's rows

int splits_of(const AttentionLaunch& launch, const StepView& step, const RowBlock& block) {
  int splits = 0;
  for (int s = step.segment_begin[block.sequence]; s < step.segment_begin[block.sequence + 1]; ++s) {
    splits += split_count(visible_slots(launch, step, block, s));
  }
  return splits;
}

// Rows [begin, end) of a block.
RowBlock rows_of(const RowBlock& block, int begin, int end) {
  const int last = block.in_place < end ? block.in_place : end, in_place = last > begin ? last - begin : 0;
  const int fork = in_place == end - begin ? INT32_MAX : block.fork;
  return {block.sequence, block.row_begin + begin, end - begin, in_place, fork};
}
// One of `pieces` as even as can be.
RowBlock piece_of(const RowBlock& block, int piece, int pieces) {
  return rows_of(block, block.row_count * piece / pieces, block.row_count * (piece + 1) / pieces);
}

// One split of a piece as a unit of work.
struct SplitUnit {
  RowBlock rows;
  int kv_head, segment, split;
};

// Units of a block are neighbours, head by head, in these piece by piece, splits in order. Calls f(rows, kv_head,
// first, splits) for the units of each piece with each head, `first` being their first, until it returns true.
template <class F>
void for_pieces(const AttentionLaunch& launch, const StepView& step, int pieces, const F& f) {
  int64_t first = 0;
  for (int b = 0; b < step.block_count; ++b) {
    RowBlock rows[kMaxPieces];
    int splits[kMaxPieces];
    for (int piece = 0; piece < pieces; ++piece) {
      rows[piece] = piece_of(step.blocks[b], piece, pieces);
      splits[piece] = splits_of(launch, step, rows[piece]);
    }
    for (int kv_head = 0; kv_head < launch.kv_heads; ++kv_head) {
      for (int piece = 0; piece < pieces; first += splits[piece++]) {
        if (f(rows[piece], kv_head, first, splits[piece])) return;
      }
    }
  }
}

int64_t count_units(const AttentionLaunch& launch, const StepView& step, int pieces) {
  int64_t units = 0;
  for_pieces(launch, step, pieces, [&](const RowBlock&, int, int64_t first, int splits) {
    units = first + splits;
    return false;
  });
  return units;
}

SplitUnit find_unit(const AttentionLaunch& launch, const StepView& step, int pieces, int64_t unit) {
  SplitUnit found{};
  for_pieces(launch, step, pieces, [&](const RowBlock& rows, int kv_head, int64_t first, int splits) {
    if (unit >= first + splits) return false;
    int split = int(unit - first), segment = step.segment_begin[rows.sequence];
    for (;; ++segment) {
      const int count = split_count(visible_slots(launch, step, rows, segment));
      if (split < count) break;
      split -= count;
    }
    found = {rows, kv_head, segment, split};
    return true;
  });
  return found;
}

// The number of pieces by which the workers are done soonest, where all units of one are alike. Each reads and
// unpacks keys and values for itself, which takes about as long as one more query.
int choose_pieces(const AttentionLaunch& launch, const StepView& step, int threads) {
  const int ratio = launch.heads / launch.kv_heads;
  const int64_t units = count_units(launch, step, 1);
  int rows = 0, best = 1;
  for (int b = 0; b < step.block_count; ++b)
    rows = rows > step.blocks[b].row_count ? rows : step.blocks[b].row_count;
  double least = 0;
  for (int pieces = 1; pieces <= rows && pieces <= kMaxPieces; ++pieces) {
    const double rounds = double((units * pieces + threads - 1) / threads);
    const double time = rounds * (double(rows) * ratio / pieces + 1);
    if (pieces > 1 && time >= least) continue;
    least = time;
    best = pieces;
  }
  return best;
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

// The splits of a piece with a head, one after the other, merged and written.
void merge_piece(const AttentionLaunch& launch, const StepView& step, int pieces, int64_t piece_and_head,
                 const Buffers& buffers) {
  for_pieces(launch, step, pieces, [&](const RowBlock& rows, int kv_head, int64_t first, int splits) {
    if (piece_and_head-- > 0) return false;
    BlockTask task(launch, step, rows, kv_head, buffers, {});
    task.clear_total();
    for (int split = 0; split < splits; ++split) task.merge(partial_state(launch, step, first + split));
    task.write();
    return true;
  });
}

void run_by_splits(const AttentionLaunch& launch, const StepView& step, int pieces, int64_t units,
                   const Buffers& buffers, Worker& worker) {
  worker.for_units(units, [&](int64_t unit) {
    const SplitUnit u = find_unit(launch, step, pieces, unit);
    const int segment = step.segment_begin[u.rows.sequence], head = u.kv_head + 1;
    const SlotsAt after = head < launch.kv_heads ? first_slots(launch, step, u.rows, head, segment) : SlotsAt{};
    BlockTask task(launch, step, u.rows, u.kv_head, buffers, after);
    task.run_split(u.segment, u.split, partial_state(launch, step, unit));
  });
  worker.for_units(int64_t(step.block_count) * pieces * launch.kv_heads,
                   [&](int64_t i) { merge_piece(launch, step, pieces, i, buffers); });
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
  int pieces = 1;
  if (worker.team->threads() > 1 && tasks < kTasksPerWorker * worker.team->threads()) {
    pieces = choose_pieces(launch, step, worker.team->threads());
    const int64_t units = count_units(launch, step, pieces);
    if (units > tasks * pieces && units * int64_t(partial_bytes(launch)) <= step.partial_bytes) {
      return run_by_splits(launch, step, pieces, units, buffers, worker);
    }
  }
  const int per_block = launch.kv_heads * pieces;
  // Later blocks of a prompt see more: starting with them leaves small ones for the end.
  const auto rows_of_unit = [&](int64_t i) {
    return piece_of(step.blocks[step.block_count - 1 - i / per_block], int(i % pieces), pieces);
  };
  const auto head_of_unit = [&](int64_t i) { return int(i % per_block / pieces); };
  worker.for_units(tasks * pieces, [&](int64_t i) {
    const RowBlock rows = rows_of_unit(i);
    if (rows.row_count == 0) return;
    SlotsAt after{};
    if (i + 1 < tasks * pieces) {
      const RowBlock next = rows_of_unit(i + 1);
      after = first_slots(launch, step, next, head_of_unit(i + 1), step.segment_begin[next.sequence]);
    }
    BlockTask(launch, step, rows, head_of_unit(i), buffers, after).run();
  });
}

RIDGELINE_END
