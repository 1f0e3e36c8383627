// What the parts of check_kernels share: a report of one line per check, numbers that are the same on every
// machine, and a step with a tape to run launches on.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "tape.h"

namespace check {

using ridgeline::Kernels;
using ridgeline::StepView;

// Prints "ok" or "FAILED", the level and what was checked.
class Report {
 public:
  void line(const std::string& level, const std::string& what, bool ok);
  int failures() const { return failures_; }

 private:
  int failures_ = 0;
};

// xorshift64*; the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t bits();
  int below(int n) { return int(bits() % uint32_t(n)); }
  float uniform() { return float(bits() >> 8) * 0x1p-24f; }
  // Nearly normal: the sum of twelve uniform numbers.
  float normal();
  std::vector<float> normals(size_t count);

 private:
  uint64_t state_;
};

// A float32 or A8 buffer as the launches take them: padded, and holding what nobody may rely on.
struct Floats {
  std::vector<float> values;
  int64_t stride;

  Floats(int rows, int width, float fill = NAN);
  ridgeline::F32Rows rows() { return {values.data(), stride}; }
  float* row(int64_t i) { return values.data() + i * stride; }
};
struct Codes {
  ridgeline::Memory memory;
  int64_t stride;

  Codes(int rows, int width);
  ridgeline::A8Rows rows() { return {memory.data(), stride}; }
  uint8_t* row(int64_t i) { return memory.data() + i * stride; }
  // Value `column` of a row of `width`.
  double value(int64_t row, int column, int width);
};

// Sequences of one segment each. Rows are the last of their sequence's slots; page tables are shuffled.
struct Sequences {
  std::vector<int> lengths, rows;
};
// Owns the arrays of a StepView.
class Step {
 public:
  explicit Step(const Sequences& sequences);
  explicit Step(int rows) : Step(Sequences{{rows}, {rows}}) {}
  StepView view() const { return view_; }
  int pages() const { return int(tables_.size()); }
  std::vector<int32_t> tokens;  // by row; to be set before a launch that reads them
  std::vector<float> logits;
  void set_logits_width(int width);

 private:
  std::vector<int32_t> positions_, slots_, row_sequence_, row_begin_, outputs_, segment_begin_, length_, first_,
      table_begin_, tables_;
  std::vector<float> bias_;
  std::vector<uint8_t> causal_;
  StepView view_{};
};

// Runs launches of one level on teams of one and of two threads.
struct Level {
  const Kernels& kernels;
  Report& report;
  std::shared_ptr<ridgeline::Team> alone, pair;

  void run(const ridgeline::AnyLaunch& launch, const Step& step, bool both_threads = false) const;
  void line(const std::string& what, bool ok) const { report.line(kernels.name, what, ok); }
};

// |seen - expected| <= tolerance, and not NaN.
inline bool near(double seen, double expected, double tolerance) {
  return std::abs(seen - expected) <= tolerance;
}
inline bool same_bits(const float* a, const float* b, size_t count) {
  return std::memcmp(a, b, count * sizeof(float)) == 0;
}

// Defined by check_simd.cpp, compiled once per level.
using SimdCheck = void (*)(Report&);
void register_simd_check(const char* level, SimdCheck check);

void check_linear(const Level& level);
void check_rows(const Level& level);
void check_attention(const Level& level);

}  // namespace check
