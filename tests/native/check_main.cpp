// Checks every ISA level that this machine runs. Exit code 1 if a check failed.
#include <cstdio>

#include "check.h"

namespace check {
namespace {

std::vector<std::pair<std::string, SimdCheck>>& simd_checks() {
  static std::vector<std::pair<std::string, SimdCheck>> checks;
  return checks;
}

}  // namespace

void register_simd_check(const char* level, SimdCheck check) { simd_checks().emplace_back(level, check); }

void Report::line(const std::string& level, const std::string& what, bool ok) {
  std::printf("%s %s: %s\n", ok ? "ok" : "FAILED", level.c_str(), what.c_str());
  std::fflush(stdout);
  failures_ += ok ? 0 : 1;
}

uint32_t Random::bits() {
  state_ ^= state_ >> 12;
  state_ ^= state_ << 25;
  state_ ^= state_ >> 27;
  return uint32_t((state_ * 0x2545f4914f6cdd1du) >> 32);
}
float Random::normal() {
  float sum = -6.0f;
  for (int i = 0; i < 12; ++i) sum += uniform();
  return sum;
}
std::vector<float> Random::normals(size_t count) {
  std::vector<float> values(count);
  for (float& x : values) x = normal();
  return values;
}

Floats::Floats(int rows, int width, float fill)
    : values(size_t(rows) * ridgeline::round_up(size_t(width), 16), fill),
      stride(int64_t(ridgeline::round_up(size_t(width), 16))) {}

Codes::Codes(int rows, int width)
    : memory(size_t(rows) * ridgeline::a8_layout(width).row_bytes),
      stride(int64_t(ridgeline::a8_layout(width).row_bytes)) {}
double Codes::value(int64_t i, int column, int width) {
  const ridgeline::A8Layout layout = ridgeline::a8_layout(width);
  float scale;
  std::memcpy(&scale, row(i) + layout.scales + size_t(column / ridgeline::kGroup) * 4, 4);
  return double(int8_t(row(i)[column])) * double(scale);
}

Step::Step(const Sequences& sequences) {
  Random random(7);
  row_begin_ = segment_begin_ = table_begin_ = {0};
  int page_count = 0;
  for (const int length : sequences.lengths) page_count += (length + ridgeline::kPageTokens - 1) / ridgeline::kPageTokens;
  for (int i = 0; i < page_count; ++i) tables_.insert(tables_.begin() + random.below(i + 1), i);
  for (size_t s = 0; s < sequences.lengths.size(); ++s) {
    const int length = sequences.lengths[s], rows = sequences.rows[s];
    for (int slot = length - rows; slot < length; ++slot) {
      outputs_.push_back(int32_t(positions_.size()));
      positions_.push_back(slot);
      slots_.push_back(slot);
      row_sequence_.push_back(int32_t(s));
    }
    row_begin_.push_back(int32_t(positions_.size()));
    segment_begin_.push_back(int32_t(s) + 1);
    table_begin_.push_back(table_begin_.back() + (length + ridgeline::kPageTokens - 1) / ridgeline::kPageTokens);
    length_.push_back(length);
    first_.push_back(0);
    bias_.push_back(0.0f);
    causal_.push_back(1);
  }
  tokens.assign(positions_.size(), 0);
  logits.assign(1, 0.0f);
  view_.rows = view_.outputs = int32_t(positions_.size());
  view_.sequences = view_.segments = int32_t(sequences.lengths.size());
  view_.groups = 1;
  view_.tokens = tokens.data();
  view_.positions = positions_.data();
  view_.slots = slots_.data();
  view_.row_sequence = row_sequence_.data();
  view_.sequence_row_begin = row_begin_.data();
  view_.output_rows = outputs_.data();
  view_.segment_begin = segment_begin_.data();
  view_.segment_length = length_.data();
  view_.segment_first_position = first_.data();
  view_.segment_bias = bias_.data();
  view_.segment_causal = causal_.data();
  view_.table_begin = table_begin_.data();
  view_.tables = tables_.data();
  view_.pages = int64_t(tables_.size());
  set_logits_width(1);
}

void Step::set_logits_width(int width) {
  logits.assign(size_t(view_.outputs) * size_t(width), NAN);
  view_.logits = logits.data();
  view_.vocabulary = width;
}

void Level::run(const ridgeline::AnyLaunch& launch, const Step& step, bool both_threads) const {
  ridgeline::Tape tape(both_threads ? pair : alone, kernels, step.view().rows);
  tape.append("launch", launch);
  tape.run(step.view(), step.view().outputs, nullptr);
}

}  // namespace check

int main() {
  check::Report report;
  const auto alone = std::make_shared<ridgeline::Team>(1), pair = std::make_shared<ridgeline::Team>(2);
  for (const ridgeline::Kernels* kernels : ridgeline::available_kernels()) {
    for (const auto& [name, simd_check] : check::simd_checks()) {
      if (name == kernels->name) simd_check(report);
    }
    const check::Level level{*kernels, report, alone, pair};
    check::check_linear(level);
    check::check_rows(level);
    check::check_attention(level);
  }
  std::printf("%d failed\n", report.failures());
  return report.failures() == 0 ? 0 : 1;
}
