// Kernels that treat each row by itself: norms, quantisation, addition, activations, the logits' soft cap.
#include "rows.h"

#include "vector_math.h"

RIDGELINE_BEGIN

namespace {

constexpr int64_t kRowsPerUnit = 4;

// Row i of those that a launch computes, of buffers with `experts` rows for each of the step's.
RIDGELINE_INLINE int64_t row_of(const StepView& step, int64_t i, int64_t experts) {
  return experts == 1 ? step.chosen_row(i) : step.chosen_row(i / experts) * experts + i % experts;
}

RIDGELINE_INLINE vfloat load_up_to(const float* p, int count) { return load(first_lanes(count), p); }

// Sum of f(vector at column) over the row, in four interleaved accumulators. f gives zeros beyond the width.
template <class F>
RIDGELINE_INLINE float row_sum(int width, F&& f) {
  vfloat acc[4] = {zero(), zero(), zero(), zero()};
  for (int column = 0; column < width; column += 64) {
    for (int i = 0; i < 4; ++i) {
      if (column + 16 * i < width) acc[i] = acc[i] + f(column + 16 * i);
    }
  }
  return reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

void norm_row(const NormLaunch& launch, const float* x, int64_t row) {
  const int width = launch.width;
  float mean = 0.0f;
  if (launch.layer) mean = row_sum(width, [&](int c) { return load_up_to(x + c, width - c); }) / float(width);
  const auto centred = [&](int c) {
    const vmask m = first_lanes(width - c);
    return select(m, load(m, x + c) - splat(mean), zero());
  };
  const float square = row_sum(width, [&](int c) {
    const vfloat d = centred(c);
    return d * d;
  });
  const vfloat factor = splat(1.0f / __builtin_sqrtf(square / float(width) + launch.eps));
  const auto value = [&](int c) {
    vfloat y = centred(c) * factor;
    if (launch.weight != nullptr) y = y * load_up_to(launch.weight + c, width - c);
    if (launch.bias != nullptr) y = y + load_up_to(launch.bias + c, width - c);
    return y;
  };
  write_row(launch.out, row, width, [&](int c, vfloat& a, vfloat& b) {
    a = value(c);
    b = value(c + 16);
  });
}

}  // namespace

void norm(const NormLaunch& launch, const StepView& step, Worker& worker) {
  for_rows(worker, launch.gather ? step.outputs : step.chosen_rows, kRowsPerUnit, [&](int64_t i) {
    const int64_t row = launch.gather ? i : step.chosen_row(i);
    const int64_t source = launch.gather ? step.output_rows[i] : row;
    norm_row(launch, launch.x.data + source * launch.x.stride, row);
  });
}

void quantise(const QuantiseLaunch& launch, const StepView& step, Worker& worker) {
  const int64_t rows = (launch.gather ? step.outputs : step.chosen_rows) * int64_t(launch.experts);
  for_rows(worker, rows, kRowsPerUnit, [&](int64_t i) {
    const int64_t row = launch.gather ? i : row_of(step, i, launch.experts);
    const float* x = launch.x.data + (launch.gather ? step.output_rows[i] : row) * launch.x.stride;
    write_row(launch.out, row, launch.width, [&](int c, vfloat& a, vfloat& b) {
      a = load_up_to(x + c, launch.width - c);
      b = load_up_to(x + c + 16, launch.width - c - 16);
    });
  });
}

void add(const AddLaunch& launch, const StepView& step, Worker& worker) {
  const Target out{.f32 = launch.out, .accumulate = true};
  for_rows(worker, step.chosen_rows, kRowsPerUnit, [&](int64_t i) {
    const int64_t row = step.chosen_row(i);
    const float* x = launch.x.data + row * launch.x.stride;
    write_row(out, row, launch.width, [&](int c, vfloat& a, vfloat& b) {
      a = load_up_to(x + c, launch.width - c);
      b = load_up_to(x + c + 16, launch.width - c - 16);
    });
  });
}

void activate(const ActivateLaunch& launch, const StepView& step, Worker& worker) {
  for_rows(worker, step.chosen_rows * int64_t(launch.experts), kRowsPerUnit, [&](int64_t i) {
    const int64_t row = row_of(step, i, launch.experts);
    const float* x = launch.x.data + row * launch.x.stride;
    const float* times =
        launch.times.data == nullptr ? nullptr : launch.times.data + row * launch.times.stride;
    with_activation(launch.activation, [&](auto tag) {
      const auto value = [&](int c) {
        constexpr Activation kKind = decltype(tag)::kind;
        const vfloat y = activated<kKind>(load_up_to(x + c, launch.width - c));
        return times == nullptr ? y : y * gated<kKind>(load_up_to(times + c, launch.width - c));
      };
      write_row(launch.out, row, launch.width, [&](int c, vfloat& a, vfloat& b) {
        a = value(c);
        b = value(c + 16);
      });
    });
  });
}

void softcap(const SoftcapLaunch& launch, const StepView& step, Worker& worker) {
  constexpr int64_t kColumns = 4096;
  const int64_t per_row = (launch.width + kColumns - 1) / kColumns;
  worker.for_units(per_row * step.outputs, [&](int64_t unit) {
    float* logits = step.logits + unit / per_row * step.vocabulary;
    const int64_t begin = unit % per_row * kColumns;
    const int64_t end = begin + kColumns < launch.width ? begin + kColumns : launch.width;
    for (int64_t c = begin; c < end; c += 16) {
      const vmask m = first_lanes(int(end - c));
      store(m, logits + c, splat(launch.cap) * tanh(load(m, logits + c) / splat(launch.cap)));
    }
  });
}

void quantise_rows(const float* x, int64_t rows, int32_t width, uint8_t* out) {
  const Target target{.a8 = {out, int64_t(a8_layout(width).row_bytes)}};
  for (int64_t row = 0; row < rows; ++row) {
    write_row(target, row, width, [&](int c, vfloat& a, vfloat& b) {
      a = load_up_to(x + row * width + c, width - c);
      b = load_up_to(x + row * width + c + 16, width - c - 16);
    });
  }
}

RIDGELINE_END
