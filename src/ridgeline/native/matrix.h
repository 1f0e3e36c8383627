// A packed matrix as Python holds it.
#pragma once

#include <string>

#include "arrays.h"
#include "launch.h"

namespace ridgeline {

inline Storage storage_named(const std::string& name) {
  std::string names;
  for (const auto& [known, storage] : kStorages) {
    if (name == known) return storage;
    names += (names.empty() ? "" : ", ") + std::string(known);
  }
  refuse("storage", "'" + name + "'", names);
}

// Checked sizes of a matrix, or of one for each of some experts: their tiles take `packed_bytes`.
struct MatrixShape {
  Storage storage;
  int32_t rows, cols, experts;
  size_t packed_bytes;

  MatrixShape(const std::string& storage_name, int64_t rows_, int64_t cols_, int64_t experts_ = 1)
      : storage(storage_named(storage_name)) {
    constexpr int64_t kLargest = 1 << 30;
    if (rows_ < 1 || rows_ > kLargest)
      refuse("rows", std::to_string(rows_), "1 to " + std::to_string(kLargest));
    if (cols_ < 1 || cols_ > kLargest)
      refuse("cols", std::to_string(cols_), "1 to " + std::to_string(kLargest));
    if (cols_ % col_unit(storage) != 0)
      refuse("cols", std::to_string(cols_),
             "multiples of " + std::to_string(col_unit(storage)) + " in " + storage_name);
    if (experts_ < 1 || experts_ > kMaxExperts)
      refuse("experts", std::to_string(experts_), "1 to " + std::to_string(kMaxExperts));
    rows = int32_t(rows_);
    cols = int32_t(cols_);
    experts = int32_t(experts_);
    packed_bytes = size_t(experts) * size_t(tile_count(rows)) * tile_bytes(storage, cols);
  }
};

class Matrix {
 public:
  Matrix(nb::object packed, const std::string& storage_name, int64_t rows, int64_t cols, int64_t experts)
      : shape_(storage_name, rows, cols, experts), storage_name_(storage_name), packed_(packed, "packed", 1) {
    packed_.expect(0, int64_t(shape_.packed_bytes), "packed");
    packed_.expect_aligned(kLineBytes, "packed");
  }
  const MatrixShape& shape() const { return shape_; }
  const std::string& storage_name() const { return storage_name_; }
  // Of the first expert; the others follow.
  MatrixView view() const { return {packed_.data(), shape_.storage, shape_.rows, shape_.cols}; }

 private:
  MatrixShape shape_;
  std::string storage_name_;
  Array<uint8_t> packed_;
};

}  // namespace ridgeline
