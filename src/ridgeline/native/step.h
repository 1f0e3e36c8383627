// One step as the kernels see it: plain pointers into the caller's arrays, valid while the step runs.
#pragma once

#include <cstdint>

#include "layout.h"

namespace ridgeline {

// Query rows of one sequence that attention handles together. The first `in_place` of them lie where they stand;
// the others are on side branches of a tree, and from slot `fork` on the slots that they see are not in order.
struct RowBlock {
  int32_t sequence, row_begin, row_count, in_place, fork;
};

constexpr int kBlockRows = 16;

// Rows that are neighbours.
struct RowRun {
  int32_t begin, count;
};

struct StepView {
  int32_t rows, outputs, sequences, segments, groups;
  const int32_t* tokens;                  // (rows)
  const int32_t* positions;               // (rows) rotary position
  const int32_t* slots;                   // (rows) slot in the sequence's last segment
  const int32_t* row_sequence;            // (rows)
  const int32_t* sequence_row_begin;      // (sequences + 1)
  const int32_t* output_rows;             // (outputs)
  const int32_t* parents;                 // (rows) the row before, -1 for none; null where nothing is a tree
  const int32_t* segment_begin;           // (sequences + 1)
  const int32_t* segment_length;          // (segments)
  const int32_t* segment_first_position;  // (segments)
  const float* segment_bias;              // (segments)
  const uint8_t* segment_causal;          // (segments)
  const int32_t* table_begin;             // (segments + 1)
  const int32_t* tables;                  // (groups, pages)
  int64_t pages;                          // entries of each group's table
  float* logits;                          // (at least outputs, vocabulary)
  int64_t vocabulary;
  // The rows that a launch computes, each where it lies: all of the step's, or those with outputs; in order, once
  // each, as runs, and cut for attention.
  const int32_t* chosen;  // (chosen_rows); null where they are all
  int32_t chosen_rows;
  const RowRun* runs;
  int32_t run_count;
  const RowBlock* blocks;
  int32_t block_count;
  uint8_t* partials;  // memory that the workers share within a launch
  int64_t partial_bytes;

  RIDGELINE_MEMBER int64_t chosen_row(int64_t i) const { return chosen == nullptr ? i : chosen[i]; }
};

// The slot from which on those that a row sees are not in order: the first on its path that does not lie where it
// stands, or the one behind it. The last segment's slots begin at position `first`.
RIDGELINE_INLINE int32_t path_fork(const StepView& step, int64_t row, int64_t first) {
  int64_t fork = step.positions[row] - first + 1;
  while (row >= 0 && step.positions[row] - first != step.slots[row]) {
    fork = step.positions[row] - first;
    row = step.parents[row];
  }
  return int32_t(fork);
}

}  // namespace ridgeline
