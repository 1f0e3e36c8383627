// Rows of activations as the bindings take them: told apart, checked against a tape's rows, and kept alive.
#pragma once

#include <vector>

#include "arrays.h"
#include "launch.h"

namespace ridgeline {

// The kinds of row buffers, told apart by their item types; what is none of them counts as float32.
enum class RowKind { f32, a8, bf16 };

inline RowKind row_kind(nb::handle object) {
  if (Array<uint8_t>::holds(object)) return RowKind::a8;
  return Array<uint16_t>::holds(object) ? RowKind::bf16 : RowKind::f32;
}

// What a linear of this storage reads.
inline RowKind row_kind(Storage storage) {
  if (is_quantised(storage)) return RowKind::a8;
  return storage == Storage::bf16 ? RowKind::bf16 : RowKind::f32;
}

inline const char* name_of(RowKind kind) {
  return kind == RowKind::a8 ? "A8" : kind == RowKind::bf16 ? "bfloat16" : "float32";
}

inline void check_accumulate(bool accumulate, RowKind out) {
  if (accumulate && out != RowKind::f32)
    refuse("accumulate", "True", "False where out is not a float32 buffer");
}

// Buffers have a row for each of the step's, or one for each of that row's `experts`.
class RowBuffers {
 protected:
  explicit RowBuffers(int32_t max_rows) : max_rows_(max_rows) {}

  F32Rows f32(nb::handle object, const char* name, int64_t width, Access access = Access::write,
              int64_t experts = 1) {
    Array<float> array(object, name, 2, access);
    array.expect_at_least(0, max_rows_ * experts, name);
    array.expect_at_least(1, width, name);
    if (array.size(1) % 16 != 0) {
      refuse(std::string(name) + ".shape[1]", std::to_string(array.size(1)), "a multiple of 16");
    }
    floats_.push_back(std::move(array));
    return {floats_.back().data(), floats_.back().size(1)};
  }

  A8Rows a8(nb::handle object, const char* name, int64_t width, Access access = Access::write,
            int64_t experts = 1) {
    Array<uint8_t> array(object, name, 2, access);
    array.expect_at_least(0, max_rows_ * experts, name);
    array.expect(1, int64_t(a8_layout(int(width)).row_bytes), name);
    array.expect_aligned(kLineBytes, name);
    bytes_.push_back(std::move(array));
    return {bytes_.back().data(), bytes_.back().size(1)};
  }

  // A row's last value is read with its partner, and 32 values fill a line.
  Bf16Rows bf16(nb::handle object, const char* name, int64_t width, Access access = Access::write,
                int64_t experts = 1) {
    Array<uint16_t> array(object, name, 2, access);
    array.expect_at_least(0, max_rows_ * experts, name);
    array.expect_at_least(1, width, name);
    if (array.size(1) % 32 != 0) {
      refuse(std::string(name) + ".shape[1]", std::to_string(array.size(1)), "a multiple of 32");
    }
    halves_.push_back(std::move(array));
    return {halves_.back().data(), halves_.back().size(1)};
  }

  Target target(nb::handle object, const char* name, int64_t width, bool accumulate, int64_t experts = 1) {
    const RowKind kind = row_kind(object);
    check_accumulate(accumulate, kind);
    if (kind == RowKind::a8) return {.a8 = a8(object, name, width, Access::write, experts)};
    if (kind == RowKind::bf16) return {.bf16 = bf16(object, name, width, Access::write, experts)};
    return {.f32 = f32(object, name, width, Access::write, experts), .accumulate = accumulate};
  }

  InputRows input(nb::handle object, const char* name, int64_t width, int64_t experts = 1) {
    const auto rows = [](const auto& x) {
      return InputRows{reinterpret_cast<const uint8_t*>(x.data), x.stride * int64_t(sizeof *x.data)};
    };
    const RowKind kind = row_kind(object);
    if (kind == RowKind::a8) return rows(a8(object, name, width, Access::read, experts));
    if (kind == RowKind::bf16) return rows(bf16(object, name, width, Access::read, experts));
    return rows(f32(object, name, width, Access::read, experts));
  }

 private:
  int32_t max_rows_;
  std::vector<Array<float>> floats_;
  std::vector<Array<uint8_t>> bytes_;
  std::vector<Array<uint16_t>> halves_;
};

}  // namespace ridgeline
