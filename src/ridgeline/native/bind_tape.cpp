// Python's Part, StepInputs and Tape: every array is checked here, once, when a launch is appended.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind_tape.h"

namespace ridgeline {
namespace {

struct PyStep {
  PyStep(nb::object tokens, nb::object positions, nb::object slots, nb::object row_sequence,
         nb::object sequence_row_begin, nb::object output_rows, nb::object segment_begin,
         nb::object segment_length, nb::object segment_first_position, nb::object segment_bias,
         nb::object segment_causal, nb::object table_begin, nb::object tables, nb::object logits_,
         nb::object parents) {
    logits = Array<float>(logits_, "logits", 2, Access::write);
    bias = Array<float>(segment_bias, "segment_bias", 1);
    causal = Array<uint8_t>(segment_causal, "segment_causal", 1);
    view.tokens = ints(tokens, "tokens", -1);
    view.rows = last_size_;
    view.positions = ints(positions, "positions", view.rows);
    view.slots = ints(slots, "slots", view.rows);
    view.row_sequence = ints(row_sequence, "row_sequence", view.rows);
    view.sequence_row_begin = ints(sequence_row_begin, "sequence_row_begin", -1);
    view.sequences = checked_int("sequences", last_size_ - 1, 0, kLargest);
    view.segment_begin = ints(segment_begin, "segment_begin", view.sequences + 1);
    view.output_rows = ints(output_rows, "output_rows", -1);
    view.outputs = last_size_;
    if (!parents.is_none()) view.parents = ints(parents, "parents", view.rows);
    view.segment_length = ints(segment_length, "segment_length", -1);
    view.segments = last_size_;
    view.segment_first_position = ints(segment_first_position, "segment_first_position", view.segments);
    bias.expect(0, view.segments, "segment_bias");
    causal.expect(0, view.segments, "segment_causal");
    view.segment_bias = bias.data();
    view.segment_causal = causal.data();
    view.table_begin = ints(table_begin, "table_begin", view.segments + 1);
    arrays.emplace_back(tables, "tables", 2);
    view.tables = arrays.back().data();
    view.groups = checked_int("tables.shape[0]", arrays.back().size(0), 0, kLargest);
    view.pages = arrays.back().size(1);
    view.logits = logits.data();
    view.vocabulary = logits.size(1);
  }

  StepView view{};
  Array<float> logits, bias;
  Array<uint8_t> causal;
  std::vector<Array<int32_t>> arrays;

 private:
  const int32_t* ints(nb::handle object, const char* name, int64_t size) {
    Array<int32_t> array(object, name, 1);
    if (size >= 0) array.expect(0, size, name);
    last_size_ = checked_int(name, array.size(0), 0, kLargest);
    arrays.push_back(std::move(array));
    return arrays.back().data();
  }
  int32_t last_size_ = 0;
};

class PyTape : public ExpertTape {
 public:
  using ExpertTape::ExpertTape;

  void only_outputs(bool only) { tape_.only_outputs(only); }

  void embed(std::shared_ptr<Matrix> matrix, nb::object out, float scale, const std::string& source,
             bool accumulate) {
    if (source != "tokens" && source != "positions")
      refuse("source", "'" + source + "'", "tokens or positions");
    check_single("matrix", *matrix);
    EmbedLaunch launch{matrix->view(), f32(out, "out", matrix->shape().cols), scale, source == "positions",
                       accumulate};
    matrices_.push_back(std::move(matrix));
    tape_.append("embed", launch);
  }

  void norm(nb::object x, nb::object out, const std::string& kind, float eps, int64_t width,
            nb::object weight, nb::object bias, bool gather, bool accumulate) {
    const int32_t w = checked_int("width", width, 1, kLargest);
    tape_.append("norm",
                 NormLaunch{f32(x, "x", w, Access::read), target(out, "out", w, accumulate), w, eps,
                            vector(weight, "weight", w), vector(bias, "bias", w), is_layer("kind", kind),
                            gather});
  }

  void quantise(nb::object x, nb::object out, int64_t width, bool gather, int64_t experts) {
    const int32_t w = checked_int("width", width, 1, kLargest);
    if (row_kind(out) == RowKind::f32) refuse("out", "not an A8 or bfloat16 buffer", "uint8 or uint16 rows");
    const int32_t each = checked_int("experts", experts, 1, gather ? 1 : kMaxExperts);
    tape_.append("quantise", QuantiseLaunch{f32(x, "x", w, Access::read, each),
                                            target(out, "out", w, false, each), w, gather, each});
  }

  void add(nb::object x, nb::object out, int64_t width) {
    const int32_t w = checked_int("width", width, 1, kLargest);
    tape_.append("add", AddLaunch{f32(x, "x", w, Access::read), f32(out, "out", w), w});
  }

  void activate(nb::object x, nb::object out, int64_t width, const std::string& activation,
                nb::object times, int64_t experts) {
    const int32_t w = checked_int("width", width, 1, kLargest),
                  each = checked_int("experts", experts, 1, kMaxExperts);
    ActivateLaunch launch{f32(x, "x", w, Access::read, each),
                          {},
                          target(out, "out", w, false, each),
                          w,
                          activation_named(activation),
                          each};
    if (!times.is_none()) launch.times = f32(times, "times", w, Access::read, each);
    tape_.append("activate", launch);
  }

  void linear(nb::object x, const std::vector<std::shared_ptr<PyPart>>& parts, bool outputs_only) {
    if (parts.empty()) refuse("parts", "empty", "at least one part");
    LinearLaunch launch{};
    launch.cols = parts[0]->matrix->shape().cols;
    launch.outputs_only = outputs_only;
    launch.x = input(x, "x", launch.cols);
    for (const auto& part : parts) {
      check_single("matrix", *part->matrix);
      check_operand(*part->matrix, launch.cols, row_kind(x));
      if (part->gate != nullptr) check_operand(*part->gate, launch.cols, row_kind(x));
      launch.parts.push_back(bind_part(*part, outputs_only));
    }
    for (const auto& part : parts) {
      matrices_.push_back(part->matrix);
      matrices_.push_back(part->gate);
    }
    tape_.append("linear", std::move(launch));
  }

  void softcap(int64_t width, float cap) {
    if (!(cap > 0.0f)) refuse("cap", std::to_string(cap), "a positive number");
    tape_.append("softcap", SoftcapLaunch{checked_int("width", width, 1, kLargest), cap});
  }

  void rope_store(nb::object q, nb::object k, nb::object v, nb::object pool, int64_t group, int64_t heads,
                  int64_t kv_heads, int64_t head_dim, nb::object cos, nb::object sin, int64_t rotary_dim,
                  nb::object q_norm, nb::object k_norm, float eps, const std::string& norm_kind,
                  bool norm_by_head, nb::object rounded_q) {
    RopeStoreLaunch launch{};
    check_heads(heads, kv_heads, head_dim, group);
    launch.q = f32(q, "q", heads * head_dim, rounded_q.is_none() ? Access::write : Access::read);
    if (!rounded_q.is_none()) launch.rounded_q = bf16(rounded_q, "rounded_q", heads * head_dim);
    launch.k = f32(k, "k", kv_heads * head_dim, Access::read);
    launch.v = f32(v, "v", kv_heads * head_dim, Access::read);
    launch.pool = pages(pool, kv_heads, head_dim, Access::write);
    launch.group = int32_t(group);
    launch.heads = int32_t(heads);
    launch.kv_heads = int32_t(kv_heads);
    launch.head_dim = int32_t(head_dim);
    if (cos.is_none() != sin.is_none()) refuse("sin", "not given with cos", "both cos and sin, or neither");
    if (!cos.is_none()) {
      if (rotary_dim < 2 || rotary_dim > head_dim || rotary_dim % 2 != 0) {
        refuse("rotary_dim", std::to_string(rotary_dim), "an even number, 2 to " + std::to_string(head_dim));
      }
      launch.rotary_dim = int32_t(rotary_dim);
      launch.cos = angles(cos, "cos", rotary_dim / 2);
      launch.sin = angles(sin, "sin", rotary_dim / 2);
    }
    launch.q_norm = vector(q_norm, "q_norm", norm_by_head ? heads * head_dim : head_dim);
    launch.k_norm = vector(k_norm, "k_norm", norm_by_head ? kv_heads * head_dim : head_dim);
    launch.eps = eps;
    launch.norm_stride = norm_by_head ? launch.head_dim : 0;
    launch.layer_norm = is_layer("norm_kind", norm_kind);
    tape_.append("rope_store", launch);
  }

  void attention(nb::object q, nb::object out, nb::object pool, int64_t group, int64_t heads,
                 int64_t kv_heads, int64_t head_dim, float scale, int64_t window, float softcap,
                 nb::object sinks) {
    AttentionLaunch launch{};
    check_heads(heads, kv_heads, head_dim, group);
    if (row_kind(out) == RowKind::a8 && head_dim % kGroup != 0) {
      refuse("head_dim", std::to_string(head_dim), "a multiple of 32 where out is an A8 buffer");
    }
    if (row_kind(q) == RowKind::bf16) {
      launch.rounded_q = bf16(q, "q", heads * head_dim, Access::read);
    } else {
      launch.q = f32(q, "q", heads * head_dim, Access::read);
    }
    launch.out = target(out, "out", heads * head_dim, false);
    launch.pool = pages(pool, kv_heads, head_dim, Access::read);
    launch.group = int32_t(group);
    launch.heads = int32_t(heads);
    launch.kv_heads = int32_t(kv_heads);
    launch.head_dim = int32_t(head_dim);
    launch.window = checked_int("window", window, 0, kLargest);
    launch.scale = scale;
    launch.softcap = softcap;
    launch.sinks = vector(sinks, "sinks", heads);
    tape_.append("attention", launch);
  }

  void run(const PyStep& step, std::vector<double>* seconds) {
    nb::gil_scoped_release release;
    tape_.run(step.view, step.logits.size(0), seconds);
  }

 private:
  const float* angles(nb::handle object, const char* name, int64_t width) {
    Array<float> array(object, name, 2);
    array.expect_at_least(0, tape_.max_rows(), name);
    array.expect(1, width, name);
    vectors_.push_back(std::move(array));
    return vectors_.back().data();
  }

  KvPool pages(nb::handle object, int64_t kv_heads, int64_t head_dim, Access access) {
    if (Array<float>::holds(object))
      return pages(f32_pools_, KvFormat::f32, object, kv_heads, head_dim, access);
    if (Array<uint8_t>::holds(object))
      return pages(int8_pools_, KvFormat::int8, object, kv_heads, head_dim, access);
    return pages(bf16_pools_, KvFormat::bf16, object, kv_heads, head_dim, access);
  }

  template <class T>
  static KvPool pages(std::vector<Array<T>>& kept, KvFormat format, nb::handle object, int64_t kv_heads,
                      int64_t head_dim, Access access) {
    Array<T> array(object, "pool", 3, access);
    array.expect(1, kv_heads, "pool");
    array.expect(2, int64_t(page_bytes(format, int(head_dim)) / sizeof(T)), "pool");
    if (format == KvFormat::int8) array.expect_aligned(sizeof(float), "pool");
    kept.push_back(std::move(array));
    return {kept.back().data(), kept.back().size(0), format};
  }

  static void check_heads(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t group) {
    checked_int("heads", heads, 1, 1 << 16);
    checked_int("kv_heads", kv_heads, 1, heads);
    checked_int("group", group, 0, kLargest);
    if (heads % kv_heads != 0) refuse("heads", std::to_string(heads), "a multiple of kv_heads");
    if (head_dim < 2 || head_dim > kMaxHeadDim || head_dim % 2 != 0) {
      refuse("head_dim", std::to_string(head_dim), "an even number, 2 to " + std::to_string(kMaxHeadDim));
    }
  }

  static bool is_layer(const char* name, const std::string& kind) {
    if (kind != "rms" && kind != "layer") refuse(name, "'" + kind + "'", "rms or layer");
    return kind == "layer";
  }

  LinearPart bind_part(const PyPart& part, bool outputs_only) {
    const MatrixShape& shape = part.matrix->shape();
    LinearPart bound{};
    bound.matrix = part.matrix->view();
    if (part.gate != nullptr) bound.gate = part.gate->view();
    bound.bias = vector(part.bias, "bias", shape.rows);
    bound.gate_bias = vector(part.gate_bias, "gate_bias", shape.rows);
    bound.activation = part.activation;
    if (!part.out.is_none()) {
      bound.out = target(part.out, "out", shape.rows, part.accumulate);
    } else if (outputs_only && !part.accumulate) {
      bound.out = {};
    } else {
      refuse("out", "None", "a buffer; the step's logits need outputs_only and no accumulate");
    }
    return bound;
  }

  std::vector<Array<float>> f32_pools_;
  std::vector<Array<uint16_t>> bf16_pools_;
  std::vector<Array<uint8_t>> int8_pools_;
};

}  // namespace

void bind_tape(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<PyPart>(m, "Part").def(nb::init<std::shared_ptr<Matrix>, nb::object, nb::object,
                                             std::shared_ptr<Matrix>, nb::object, const std::string&, bool>(),
                                    "matrix"_a, "out"_a.none(), "bias"_a = nb::none(), "gate"_a = nb::none(),
                                    "gate_bias"_a = nb::none(), "activation"_a = "none",
                                    "accumulate"_a = false);
  nb::class_<PyStep>(m, "StepInputs")
      .def(nb::init<nb::object, nb::object, nb::object, nb::object, nb::object, nb::object, nb::object,
                    nb::object, nb::object, nb::object, nb::object, nb::object, nb::object, nb::object,
                    nb::object>(),
           "tokens"_a, "positions"_a, "slots"_a, "row_sequence"_a, "sequence_row_begin"_a, "output_rows"_a,
           "segment_begin"_a, "segment_length"_a, "segment_first_position"_a, "segment_bias"_a,
           "segment_causal"_a, "table_begin"_a, "tables"_a, "logits"_a, "parents"_a = nb::none())
      .def_prop_ro("rows", [](const PyStep& s) { return s.view.rows; })
      .def_prop_ro("outputs", [](const PyStep& s) { return s.view.outputs; });
  nb::class_<PyTape>(m, "Tape")
      .def(nb::init<std::shared_ptr<Team>, const std::string&, int64_t>(), "team"_a, "isa"_a, "max_rows"_a)
      .def_prop_ro("isa", [](PyTape& t) { return t.tape().kernels().name; })
      .def_prop_ro("max_rows", [](PyTape& t) { return t.tape().max_rows(); })
      .def_prop_ro("launches", [](PyTape& t) { return t.tape().names(); })
      .def("only_outputs", &PyTape::only_outputs, "only"_a)
      .def("embed", &PyTape::embed, "matrix"_a, "out"_a, "scale"_a = 1.0f, "source"_a = "tokens",
           "accumulate"_a = false)
      .def("norm", &PyTape::norm, "x"_a, "out"_a, "kind"_a, "eps"_a, "width"_a, "weight"_a = nb::none(),
           "bias"_a = nb::none(), "gather"_a = false, "accumulate"_a = false)
      .def("quantise", &PyTape::quantise, "x"_a, "out"_a, "width"_a, "gather"_a = false,
           "experts"_a = 1)
      .def("add", &PyTape::add, "x"_a, "out"_a, "width"_a)
      .def("activate", &PyTape::activate, "x"_a, "out"_a, "width"_a, "activation"_a, "times"_a = nb::none(),
           "experts"_a = 1)
      .def("linear", &PyTape::linear, "x"_a, "parts"_a, "outputs_only"_a = false)
      .def("route", &PyTape::route, "x"_a, "out"_a, "router"_a, "chosen"_a, "renormalise"_a,
           "bias"_a = nb::none(), "shared_gate"_a = nb::none())
      .def("experts", &PyTape::experts, "x"_a, "routes"_a, "part"_a, "x_by_expert"_a = false)
      .def("combine", &PyTape::combine, "x"_a, "routes"_a, "out"_a, "width"_a, "shared"_a = nb::none(),
           "accumulate"_a = false)
      .def("softcap", &PyTape::softcap, "width"_a, "cap"_a)
      .def("rope_store", &PyTape::rope_store, "q"_a, "k"_a, "v"_a, "pool"_a, "group"_a, "heads"_a,
           "kv_heads"_a, "head_dim"_a, "cos"_a = nb::none(), "sin"_a = nb::none(), "rotary_dim"_a = 0,
           "q_norm"_a = nb::none(), "k_norm"_a = nb::none(), "eps"_a = 1e-6f, "norm_kind"_a = "rms",
           "norm_by_head"_a = false, "rounded_q"_a = nb::none())
      .def("attention", &PyTape::attention, "q"_a, "out"_a, "pool"_a, "group"_a, "heads"_a, "kv_heads"_a,
           "head_dim"_a, "scale"_a, "window"_a = 0, "softcap"_a = 0.0f, "sinks"_a = nb::none())
      .def(
          "run", [](PyTape& t, const PyStep& step) { t.run(step, nullptr); }, "step"_a)
      .def(
          "profile",
          [](PyTape& t, const PyStep& step) {
            std::vector<double> seconds;
            t.run(step, &seconds);
            return seconds;
          },
          "step"_a);
}

}  // namespace ridgeline
