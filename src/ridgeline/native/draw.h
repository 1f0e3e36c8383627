// Drawing a token from each row of logits: what is asked of a row. execution/draw.py has the rule.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ridgeline {

constexpr int32_t kNotDrawn = -1;

// A change to some logits of a row: adds amounts; or divides what is positive by a factor and multiplies the
// rest with it; or forbids the tokens.
enum class EditKind : uint8_t { add, scale, ban };
struct LogitEdit {
  EditKind kind;
  const int64_t* ids;
  int64_t count;
  const float* amounts;  // of `add`, one for each id
  float factor;          // of `scale`
};

struct RowDraw {
  bool wanted = false;
  float temperature = 0.0f;  // 0 is greedy
  int64_t top_k = 0;         // 0: off
  double top_p = 1.0;        // 1: off
  float log_min_p = 0.0f;    // -infinity: off
  uint64_t seed = 0, choice = 0, position = 0;
  const int32_t* mask = nullptr;  // a bit for each token, or null: all may be drawn
  const LogitEdit* edits = nullptr;
  int64_t edit_count = 0, edited = 0;  // edits, and the ids that all of them have
};

// What a worker needs to draw from rows of that width, of which none has more than `edited` edited ids.
constexpr size_t draw_scratch_bytes(int32_t vocabulary, int64_t edited) {
  const size_t padded = (size_t(vocabulary) + 63) / 64 * 64;
  return (4 * (padded + 64) + padded / 64 + 64 + size_t(edited)) * 4;
}

}  // namespace ridgeline
