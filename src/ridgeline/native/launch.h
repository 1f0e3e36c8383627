// What a tape holds: one record per kernel call with its pointers bound, and the table of kernels that run
// them. Pointers are borrowed; the owner of the tape keeps the arrays alive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "draw.h"
#include "step.h"
#include "storage.h"
#include "team.h"

namespace ridgeline {

enum class Activation : uint8_t { none, silu, gelu_tanh, gelu, clamped_silu };

struct F32Rows {
  float* data = nullptr;
  int64_t stride = 0;  // floats
};
struct A8Rows {
  uint8_t* data = nullptr;
  int64_t stride = 0;  // bytes
};
struct Bf16Rows {
  uint16_t* data = nullptr;
  int64_t stride = 0;  // values
};
// Rows of any of these kinds, as a linear reads them.
struct InputRows {
  const uint8_t* data = nullptr;
  int64_t row_bytes = 0;
};

// Where rows of results go: float32, quantised to A8, rounded to bfloat16, or the step's logits (no pointer
// set).
struct Target {
  F32Rows f32 = {};
  A8Rows a8 = {};
  Bf16Rows bf16 = {};
  bool accumulate = false;

  bool is_logits() const { return f32.data == nullptr && a8.data == nullptr && bf16.data == nullptr; }
};

struct MatrixView {
  const uint8_t* data = nullptr;
  Storage storage = Storage::f32;
  int32_t rows = 0, cols = 0;

  size_t bytes() const { return size_t(tile_count(rows)) * tile_bytes(storage, cols); }
};

struct EmbedLaunch {
  MatrixView matrix;
  F32Rows out;
  float scale;
  bool by_position, accumulate;
};
struct NormLaunch {
  F32Rows x;
  Target out;
  int32_t width;
  float eps;
  const float *weight, *bias;
  bool layer, gather;
};
struct QuantiseLaunch {
  F32Rows x;
  Target out;
  int32_t width;
  bool gather;
  int32_t experts = 1;  // rows of the buffers for each of the step's
};
struct AddLaunch {
  F32Rows x, out;
  int32_t width;
};
struct ActivateLaunch {
  F32Rows x, times;
  Target out;
  int32_t width;
  Activation activation;
  int32_t experts = 1;  // rows of the buffers for each of the step's
};
struct LinearPart {
  MatrixView matrix, gate;  // gate.data is null where there is none
  const float *bias, *gate_bias;
  Target out;
  Activation activation;
};
struct LinearLaunch {
  InputRows x;
  int32_t cols;
  bool outputs_only;
  std::vector<LinearPart> parts;
};
// A step's routes (layout.h) in a buffer for `max_rows` rows.
struct Routes {
  int32_t* data = nullptr;
  int64_t max_rows = 0;
  int32_t width = 0, chosen = 0;

  const RouteBlock* blocks() const { return reinterpret_cast<const RouteBlock*>(data + layout().blocks); }
  const int32_t* pairs() const { return data + layout().pairs; }
  const int32_t* block_count() const { return data + max_rows * width; }
  const float* scores(int64_t row) const {
    return reinterpret_cast<const float*>(data + row * width + chosen);
  }
  RoutesLayout layout() const { return routes_layout(max_rows, width); }
};
struct RouteLaunch {
  F32Rows x;
  MatrixView router;                // float32
  const float *bias, *shared_gate;  // (experts), (cols), or null
  Routes out;
  bool renormalise;
};
struct ExpertLaunch {
  InputRows x;
  bool x_by_expert;  // x has a row for each of a row's experts, as the output has
  Routes routes;
  int32_t count;    // experts there are
  LinearPart part;  // weights and biases of the first; those of the others follow
};
struct CombineLaunch {
  F32Rows x, shared;  // shared.data is null where there is none
  Routes routes;
  Target out;
  int32_t width;
};
struct SoftcapLaunch {
  int32_t width;
  float cap;
};
// A layer's keys and values (layout.h): pages, and in each the heads one after the other.
struct KvPool {
  void* data;
  int64_t pages;
  KvFormat format;

  RIDGELINE_MEMBER uint8_t* head(int64_t page, int kv_heads, int kv_head, int head_dim) const {
    const int64_t index = page * kv_heads + kv_head;
    return static_cast<uint8_t*>(data) + index * int64_t(page_bytes(format, head_dim));
  }
};
struct RopeStoreLaunch {
  F32Rows q, k, v;
  Bf16Rows rounded_q;  // where q goes; without it, q is rewritten in place
  KvPool pool;
  int32_t group, heads, kv_heads, head_dim, rotary_dim;
  const float *cos, *sin;  // (max_rows, rotary_dim / 2) or null
  const float *q_norm, *k_norm;
  float eps;
  int32_t norm_stride;  // from one head's gain to the next one's: head_dim, or 0 where they share it
  bool layer_norm;
};
struct AttentionLaunch {
  F32Rows q;
  Bf16Rows rounded_q;  // instead of q
  Target out;
  KvPool pool;
  int32_t group, heads, kv_heads, head_dim, window;
  float scale;
  float softcap;       // 0: scores are not bounded
  const float* sinks;  // (heads) or null
};

// Arithmetic whose peak is measured.
constexpr size_t kReadStep = 512;  // bytes that read_lines takes at a time
enum class PeakFormat : uint8_t { int8, int8_unpacked, bf16, fp32 };

// Kernels of one ISA level. Every worker makes the same calls, each with the same phases (Worker::for_units).
struct Kernels {
  const char* name;
  int32_t tile_rows;  // that share the unpacking of weights in a linear
  void (*embed)(const EmbedLaunch&, const StepView&, Worker&);
  void (*norm)(const NormLaunch&, const StepView&, Worker&);
  void (*quantise)(const QuantiseLaunch&, const StepView&, Worker&);
  void (*add)(const AddLaunch&, const StepView&, Worker&);
  void (*activate)(const ActivateLaunch&, const StepView&, Worker&);
  void (*linear)(const LinearLaunch&, const StepView&, Worker&);
  void (*route)(const RouteLaunch&, const StepView&, Worker&);
  void (*experts)(const ExpertLaunch&, const StepView&, Worker&);
  void (*combine)(const CombineLaunch&, const StepView&, Worker&);
  void (*softcap)(const SoftcapLaunch&, const StepView&, Worker&);
  void (*rope_store)(const RopeStoreLaunch&, const StepView&, Worker&);
  void (*attention)(const AttentionLaunch&, const StepView&, Worker&);
  size_t (*linear_scratch_bytes)(const LinearLaunch&);
  size_t (*attention_scratch_bytes)(const AttentionLaunch&);
  size_t (*expert_scratch_bytes)(const ExpertLaunch&);
  size_t (*route_partial_bytes)(const RouteLaunch&);  // of StepView::partials
  void (*unpack_row)(const MatrixView&, int64_t row, float* out);
  void (*quantise_rows)(const float* x, int64_t rows, int32_t width, uint8_t* out);
  void (*draw_rows)(float* logits, int64_t rows, int32_t vocabulary, const RowDraw* draws, int32_t* tokens,
                    Worker&);  // logits are as before when it returns
  double (*peak_ops)(PeakFormat format, int64_t iterations);
  double (*peak_ratio)(PeakFormat above, PeakFormat below);
  int32_t (*read_lines)(const uint8_t* data, size_t bytes);
};

// Levels of this build, those of them that this machine runs, both best first, and the kernels of one that it
// runs (null if there is none of that name).
std::vector<const Kernels*> built_kernels();
std::vector<const Kernels*> available_kernels();
const Kernels* find_kernels(const char* name);

}  // namespace ridgeline
