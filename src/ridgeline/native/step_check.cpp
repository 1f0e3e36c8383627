// Everything that a kernel would trust a step for, checked before it runs.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "tape.h"

namespace ridgeline {
namespace {

void require(bool ok, const char* name, int64_t index, int64_t seen, const std::string& accepted) {
  if (ok) return;
  std::string where = name;
  if (index >= 0) where += "[" + std::to_string(index) + "]";
  throw std::invalid_argument(where + " is " + std::to_string(seen) + "; accepted: " + accepted);
}

std::string range(int64_t low, int64_t high) { return std::to_string(low) + " to " + std::to_string(high); }

// Offsets that start at 0, never fall and end at `last` (or below, if `at_most`).
void check_offsets(const char* name, const int32_t* offsets, int64_t count, int64_t last, bool at_most) {
  require(offsets[0] == 0, name, 0, offsets[0], "0");
  for (int64_t i = 1; i <= count; ++i) {
    require(offsets[i] >= offsets[i - 1] && offsets[i] <= last, name, i, offsets[i],
            range(offsets[i - 1], last));
  }
  require(at_most || offsets[count] == last, name, count, offsets[count], std::to_string(last));
}

void check_rows(const StepView& step, const StepNeeds& needs) {
  for (int32_t row = 0; row < step.rows; ++row) {
    require(step.tokens[row] >= 0 && step.tokens[row] < needs.token_ids, "tokens", row, step.tokens[row],
            range(0, int64_t(needs.token_ids) - 1));
    require(step.positions[row] >= 0 && step.positions[row] < needs.position_ids, "positions", row,
            step.positions[row], range(0, int64_t(needs.position_ids) - 1));
  }
  for (int32_t s = 0; s < step.sequences; ++s) {
    const int32_t last = step.segment_begin[s + 1] - 1;
    for (int32_t row = step.sequence_row_begin[s]; row < step.sequence_row_begin[s + 1]; ++row) {
      require(step.row_sequence[row] == s, "row_sequence", row, step.row_sequence[row], std::to_string(s));
      require(step.slots[row] >= 0 && step.slots[row] < step.segment_length[last], "slots", row,
              step.slots[row], "below its segment's length " + std::to_string(step.segment_length[last]));
    }
  }
  for (int32_t i = 0; i < step.outputs; ++i) {
    require(step.output_rows[i] >= 0 && step.output_rows[i] < step.rows, "output_rows", i,
            step.output_rows[i], range(0, int64_t(step.rows) - 1));
  }
}

// A step with trees: rows of a sequence lie in slots that follow each other and stand one behind their parents, so
// that every path leads back to slots that are in order.
void check_trees(const StepView& step) {
  if (step.parents == nullptr) return;
  for (int32_t s = 0; s < step.sequences; ++s) {
    const int32_t begin = step.sequence_row_begin[s], last = step.segment_begin[s + 1] - 1;
    for (int32_t row = begin; row < step.sequence_row_begin[s + 1]; ++row) {
      const int32_t parent = step.parents[row], slot = step.slots[begin];
      require(parent == -1 || (parent >= begin && parent < row), "parents", row, parent,
              "-1, or " + range(begin, int64_t(row) - 1));
      require(step.slots[row] - slot == row - begin, "slots", row, step.slots[row],
              std::to_string(int64_t(slot) + row - begin));
      const int64_t first = int64_t(step.segment_first_position[last]) + slot;
      const int64_t place = parent < 0 ? first : int64_t(step.positions[parent]) + 1;
      require(step.positions[row] == place, "positions", row, step.positions[row], std::to_string(place));
      require(step.segment_causal[last] != 0 || place == first + row - begin, "segment_causal", last, 0,
              "1 for a tree");
    }
  }
}

void check_segments(const StepView& step) {
  for (int32_t s = 0; s < step.sequences; ++s) {
    require(step.segment_begin[s + 1] > step.segment_begin[s], "segment_begin", s + 1,
            step.segment_begin[s + 1], "at least one segment for every sequence");
  }
  for (int32_t t = 0; t < step.segments; ++t) {
    const int64_t entries = step.table_begin[t + 1] - step.table_begin[t], length = step.segment_length[t];
    require(length >= 0 && length <= entries * kPageTokens, "segment_length", t, length,
            range(0, entries * kPageTokens) + ", the slots of its table");
  }
}

void check_page(const StepView& step, const GroupUse& use, int64_t entry) {
  const int64_t index = use.group * step.pages + entry, page = step.tables[index];
  require(page >= 0 && page < use.pool_pages, "tables", index, page, range(0, use.pool_pages - 1));
}

// The pages that the rows of a sequence can see in a segment: entries outside are never read.
void check_readable(const StepView& step, const GroupUse& use, int32_t sequence, int32_t segment) {
  const int32_t begin_row = step.sequence_row_begin[sequence],
                end_row = step.sequence_row_begin[sequence + 1];
  if (begin_row == end_row) return;
  const auto [low, high] = std::minmax_element(step.positions + begin_row, step.positions + end_row);
  const int64_t first = step.segment_first_position[segment], length = step.segment_length[segment];
  const int64_t begin = use.window == 0 ? 0 : std::max<int64_t>(0, *low - first - use.window + 1);
  const int64_t end = step.segment_causal[segment] ? std::min<int64_t>(length, *high - first + 1) : length;
  for (int64_t page = begin / kPageTokens; page * kPageTokens < end; ++page) {
    check_page(step, use, step.table_begin[segment] + page);
  }
  // A tree's rows may lie behind where any of them stands.
  if (step.parents == nullptr || segment + 1 != step.segment_begin[sequence + 1]) return;
  for (int32_t row = begin_row; row < end_row; ++row)
    check_page(step, use, step.table_begin[segment] + step.slots[row] / kPageTokens);
}

void check_tables(const StepView& step, const GroupUse& use) {
  require(use.group < step.groups, "groups in tables", -1, step.groups,
          "more than " + std::to_string(use.group));
  for (int32_t s = 0; s < step.sequences; ++s) {
    const int32_t last = step.segment_begin[s + 1] - 1;
    if (use.writes) {
      for (int32_t row = step.sequence_row_begin[s]; row < step.sequence_row_begin[s + 1]; ++row) {
        check_page(step, use, step.table_begin[last] + step.slots[row] / kPageTokens);
      }
      continue;
    }
    for (int32_t t = step.segment_begin[s]; t <= last; ++t) check_readable(step, use, s, t);
  }
}

}  // namespace

void check_step(const StepView& step, int64_t logits_rows, const StepNeeds& needs) {
  require(step.rows >= 1 && step.rows <= needs.max_rows, "rows", -1, step.rows, range(1, needs.max_rows));
  require(step.outputs <= needs.max_rows, "outputs", -1, step.outputs, range(0, needs.max_rows));
  if (needs.logits_width > 0) {
    require(logits_rows >= step.outputs, "rows of logits", -1, logits_rows,
            "at least " + std::to_string(step.outputs));
    require(step.vocabulary >= needs.logits_width, "columns of logits", -1, step.vocabulary,
            "at least " + std::to_string(needs.logits_width));
  }
  check_offsets("sequence_row_begin", step.sequence_row_begin, step.sequences, step.rows, false);
  check_offsets("segment_begin", step.segment_begin, step.sequences, step.segments, false);
  check_offsets("table_begin", step.table_begin, step.segments, step.pages, true);
  check_segments(step);
  check_rows(step, needs);
  check_trees(step);
  for (const GroupUse& use : needs.groups) check_tables(step, use);
}

}  // namespace ridgeline
