// What the bindings of a tape's launches share.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "bind.h"
#include "row_buffers.h"
#include "tape.h"

namespace ridgeline {

inline Activation activation_named(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  if (name == "clamped_silu") return Activation::clamped_silu;
  refuse("activation", "'" + name + "'", "none, silu, gelu_tanh, gelu or clamped_silu");
}

inline int32_t checked_int(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return int32_t(value);
  refuse(name, std::to_string(value), std::to_string(low) + " to " + std::to_string(high));
}

constexpr int64_t kLargest = 1 << 30;

struct PyPart {
  PyPart(std::shared_ptr<Matrix> matrix_, nb::object out_, nb::object bias_, std::shared_ptr<Matrix> gate_,
         nb::object gate_bias_, const std::string& activation_, bool accumulate_)
      : matrix(std::move(matrix_)),
        gate(std::move(gate_)),
        out(std::move(out_)),
        bias(std::move(bias_)),
        gate_bias(std::move(gate_bias_)),
        activation(activation_named(activation_)),
        accumulate(accumulate_) {
    if (gate != nullptr && (gate->shape().rows != matrix->shape().rows ||
                            gate->shape().cols != matrix->shape().cols ||
                            gate->shape().experts != matrix->shape().experts)) {
      refuse("gate", std::to_string(gate->shape().rows) + " x " + std::to_string(gate->shape().cols),
             "the matrix's shape, " + std::to_string(matrix->shape().rows) + " x " +
                 std::to_string(matrix->shape().cols));
    }
    if (gate == nullptr && !gate_bias.is_none()) refuse("gate_bias", "given", "None where there is no gate");
    check_accumulate(accumulate, row_kind(out));
  }

  std::shared_ptr<Matrix> matrix, gate;
  nb::object out, bias, gate_bias;
  Activation activation;
  bool accumulate;
};

// A tape, and what its launches point to; with the launches of experts.
class ExpertTape : protected RowBuffers {
 public:
  ExpertTape(std::shared_ptr<Team> team, const std::string& isa, int64_t max_rows)
      : RowBuffers(checked_int("max_rows", max_rows, 1, kLargest)),
        tape_(std::move(team), kernels_named(isa), int32_t(max_rows)) {}

  Tape& tape() { return tape_; }

  void route(nb::object x, nb::object out, std::shared_ptr<Matrix> router, int64_t chosen, bool renormalise,
             nb::object bias, nb::object shared_gate);
  void experts(nb::object x, nb::object routes, const PyPart& part, bool x_by_expert);
  void combine(nb::object x, nb::object routes, nb::object out, int64_t width, nb::object shared,
               bool accumulate);

 protected:
  const float* vector(nb::handle object, const char* name, int64_t width) {
    Array<float> array = optional_array<float>(object, name, 1);
    if (!array) return nullptr;
    array.expect(0, width, name);
    vectors_.push_back(std::move(array));
    return vectors_.back().data();
  }

  static void check_operand(const Matrix& matrix, int32_t cols, RowKind x) {
    if (matrix.shape().cols != cols) {
      refuse("cols of a part", std::to_string(matrix.shape().cols),
             std::to_string(cols) + ", as the first part has");
    }
    const RowKind wanted = row_kind(matrix.shape().storage);
    if (x != wanted) {
      refuse("x", std::string(x == RowKind::a8 ? "an " : "a ") + name_of(x) + " buffer",
             std::string(name_of(wanted)) + " for a matrix of " + matrix.storage_name());
    }
  }

  static void check_single(const char* name, const Matrix& matrix) {
    if (matrix.shape().experts != 1)
      refuse(name, "a matrix of " + std::to_string(matrix.shape().experts) + " experts", "one of one");
  }

  Tape tape_;
  std::vector<Array<float>> vectors_;
  std::vector<std::shared_ptr<Matrix>> matrices_;

 private:
  // What the last launch that routes into a buffer leaves there: the experts it names are below `count`.
  struct Routed {
    Routes routes;
    int32_t count;
  };
  const Routed& routed(nb::handle routes) const;
  const float* bias_of_experts(nb::handle object, const char* name, const MatrixShape& shape);

  std::vector<Array<int32_t>> routes_;
  std::unordered_map<const void*, Routed> routed_;
};

}  // namespace ridgeline
