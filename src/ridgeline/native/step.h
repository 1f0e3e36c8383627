// One step as the kernels see it: plain pointers into the caller's arrays, valid while the step runs.
#pragma once

#include <cstdint>

namespace ridgeline {

// Query rows of one sequence that attention handles together.
struct RowBlock {
  int32_t sequence, row_begin, row_count;
};

constexpr int kBlockRows = 16;

struct StepView {
  int32_t rows, outputs, sequences, segments, groups;
  const int32_t* tokens;                  // (rows)
  const int32_t* positions;               // (rows) rotary position
  const int32_t* slots;                   // (rows) slot in the sequence's last segment
  const int32_t* row_sequence;            // (rows)
  const int32_t* sequence_row_begin;      // (sequences + 1)
  const int32_t* output_rows;             // (outputs)
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
  const RowBlock* blocks;  // the rows, cut for attention
  int32_t block_count;
  uint8_t* partials;  // memory that the workers share within a launch
  int64_t partial_bytes;
};

}  // namespace ridgeline
