// The Tape's launches of experts.
#include "bind_tape.h"

namespace ridgeline {

void ExpertTape::route(nb::object x, nb::object out, std::shared_ptr<Matrix> router, int64_t chosen,
                       bool renormalise, nb::object bias, nb::object shared_gate) {
  check_single("router", *router);
  check_operand(*router, router->shape().cols, RowKind::f32);
  RouteLaunch launch{};
  launch.router = router->view();
  const int32_t count = launch.router.rows, cols = launch.router.cols;
  if (count > kMaxExperts) {
    refuse("rows of the router", std::to_string(count), "1 to " + std::to_string(kMaxExperts));
  }
  launch.x = f32(x, "x", cols, Access::read);
  launch.bias = vector(bias, "bias", count);
  launch.shared_gate = vector(shared_gate, "shared_gate", cols);
  launch.renormalise = renormalise;
  launch.out.chosen = checked_int("chosen", chosen, 1, count);
  launch.out.width = 2 * launch.out.chosen + (launch.shared_gate != nullptr);
  launch.out.max_rows = tape_.max_rows();
  Array<int32_t> buffer(out, "out", 1, Access::write);
  buffer.expect_at_least(0, int64_t(launch.out.layout().ints), "out");
  launch.out.data = buffer.data();
  routes_.push_back(std::move(buffer));
  matrices_.push_back(std::move(router));
  routed_[launch.out.data] = {launch.out, count};
  tape_.append("route", launch);
}

const ExpertTape::Routed& ExpertTape::routed(nb::handle routes) const {
  const auto found = routed_.find(Array<int32_t>(routes, "routes", 1).data());
  if (found == routed_.end())
    refuse("routes", "another buffer", "one that a launch before this one routes into");
  return found->second;
}

const float* ExpertTape::bias_of_experts(nb::handle object, const char* name, const MatrixShape& shape) {
  Array<float> array = optional_array<float>(object, name, 2);
  if (!array) return nullptr;
  array.expect(0, shape.experts, name);
  array.expect(1, shape.rows, name);
  vectors_.push_back(std::move(array));
  return vectors_.back().data();
}

void ExpertTape::experts(nb::object x, nb::object routes, const PyPart& part, bool x_by_expert) {
  const MatrixShape& shape = part.matrix->shape();
  const Routed& to = routed(routes);
  if (shape.experts != to.count) {
    refuse("experts of the matrix", std::to_string(shape.experts),
           std::to_string(to.count) + ", as the router has");
  }
  if (part.out.is_none()) refuse("out", "None", "a buffer");
  check_operand(*part.matrix, shape.cols, row_kind(x));
  if (part.gate != nullptr) check_operand(*part.gate, shape.cols, row_kind(x));
  ExpertLaunch launch{};
  launch.x = input(x, "x", shape.cols, x_by_expert ? to.routes.chosen : 1);
  launch.x_by_expert = x_by_expert;
  launch.routes = to.routes;
  launch.count = to.count;
  launch.part.matrix = part.matrix->view();
  if (part.gate != nullptr) launch.part.gate = part.gate->view();
  launch.part.bias = bias_of_experts(part.bias, "bias", shape);
  launch.part.gate_bias = bias_of_experts(part.gate_bias, "gate_bias", shape);
  launch.part.activation = part.activation;
  launch.part.out = target(part.out, "out", shape.rows, part.accumulate, to.routes.chosen);
  matrices_.push_back(part.matrix);
  matrices_.push_back(part.gate);
  tape_.append("experts", launch);
}

void ExpertTape::combine(nb::object x, nb::object routes, nb::object out, int64_t width, nb::object shared,
                         bool accumulate) {
  const Routes& from = routed(routes).routes;
  CombineLaunch launch{};
  launch.width = checked_int("width", width, 1, kLargest);
  launch.x = f32(x, "x", width, Access::read, from.chosen);
  launch.routes = from;
  launch.out = target(out, "out", width, accumulate);
  if (!shared.is_none()) {
    if (from.width == 2 * from.chosen) refuse("shared", "given", "None for routes without a shared gate");
    launch.shared = f32(shared, "shared", width, Access::read);
  }
  tape_.append("combine", launch);
}

}  // namespace ridgeline
