// Kernels that treat each row by itself, against double precision.
#include "check.h"

namespace check {
namespace {

using namespace ridgeline;

constexpr int kRows = 9;
constexpr int kWidths[] = {1, 15, 32, 77, 576};

Floats random_rows(int width, uint64_t seed, float scale = 1.0f) {
  Random random(seed);
  Floats x(kRows, width);
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < width; ++c) x.row(r)[c] = random.normal() * scale;
  }
  return x;
}

// Whether every value is near f(row, column), and the padding was left alone.
bool all_near(Floats& y, int width, double tolerance, const std::function<double(int, int)>& f) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < width; ++c) {
      const double expected = f(r, c);
      if (!near(y.row(r)[c], expected, tolerance * (1 + std::abs(expected)))) return false;
    }
    for (int64_t c = width; c < y.stride; ++c) {
      if (!std::isnan(y.row(r)[c])) return false;
    }
  }
  return true;
}

bool norm_is_right(const Level& level, int width, bool layer) {
  Floats x = random_rows(width, 1), out(kRows, width);
  const std::vector<float> weight = Random(2).normals(size_t(width)), bias = Random(3).normals(size_t(width));
  NormLaunch launch{};
  launch.x = x.rows();
  launch.out.f32 = out.rows();
  launch.width = width;
  launch.eps = 1e-5f;
  launch.weight = weight.data();
  launch.bias = bias.data();
  launch.layer = layer;
  level.run(launch, Step(kRows), true);
  return all_near(out, width, 1e-5, [&](int r, int c) {
    double mean = 0, square = 0;
    for (int i = 0; i < width && layer; ++i) mean += double(x.row(r)[i]) / width;
    for (int i = 0; i < width; ++i) square += (x.row(r)[i] - mean) * (x.row(r)[i] - mean) / width;
    return (x.row(r)[c] - mean) / std::sqrt(square + 1e-5) * double(weight[size_t(c)]) + double(bias[size_t(c)]);
  });
}

bool activation_is_right(const Level& level, Activation kind, double (*f)(double)) {
  constexpr int kWidth = 1000;
  Floats x = random_rows(kWidth, 4, 4.0f), times = random_rows(kWidth, 5), out(kRows, kWidth);
  x.row(0)[0] = 100.0f, x.row(0)[1] = -100.0f, x.row(0)[2] = 0.0f;
  ActivateLaunch launch{};
  launch.x = x.rows();
  launch.times = times.rows();
  launch.out.f32 = out.rows();
  launch.width = kWidth;
  launch.activation = kind;
  level.run(launch, Step(kRows), true);
  return all_near(out, kWidth, 1e-6, [&](int r, int c) { return f(double(x.row(r)[c])) * double(times.row(r)[c]); });
}

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) { return 0.5 * x * std::erfc(-x * std::sqrt(0.5)); }
double gelu_tanh(double x) {
  return 0.5 * x * (1 + std::tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
}

bool quantise_is_right(const Level& level, int width) {
  Floats x = random_rows(width, 6);
  for (int c = 0; c < width && c < kGroup; ++c) x.row(1)[c] = 0.0f;
  Codes codes(kRows, width);
  QuantiseLaunch launch{};
  launch.x = x.rows();
  launch.out.a8 = codes.rows();
  launch.width = width;
  level.run(launch, Step(kRows), true);
  const A8Layout layout = a8_layout(width);
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < layout.groups; ++g) {
      float largest = 0.0f;
      int32_t sums[2] = {0, 0}, seen[2];
      for (int c = g * kGroup; c < (g + 1) * kGroup && c < width; ++c) {
        largest = std::max(largest, std::abs(x.row(r)[c]));
      }
      for (int i = 0; i < kGroup; ++i) {
        const int c = g * kGroup + i;
        const float value = c < width ? x.row(r)[c] : 0.0f;
        const int code = int(std::nearbyint(largest == 0.0f ? 0.0f : value * (127.0f / largest)));
        if (int8_t(codes.row(r)[c]) != code) return false;
        sums[i / 16] += code;
      }
      std::memcpy(seen, codes.row(r) + layout.sums + size_t(g) * 8, 8);
      float scale, scaled_sum;
      std::memcpy(&scale, codes.row(r) + layout.scales + size_t(g) * 4, 4);
      std::memcpy(&scaled_sum, codes.row(r) + layout.scaled_sums + size_t(g) * 4, 4);
      if (seen[0] != sums[0] || seen[1] != sums[1] || scale != largest * (1.0f / 127.0f) ||
          scaled_sum != scale * float(sums[0] + sums[1])) {
        return false;
      }
    }
  }
  return true;
}

bool add_is_right(const Level& level, int width) {
  Floats x = random_rows(width, 7), out = random_rows(width, 8);
  const Floats before = out;
  AddLaunch launch{};
  launch.x = x.rows();
  launch.out = out.rows();
  launch.width = width;
  level.run(launch, Step(kRows), true);
  return all_near(out, width, 0.0, [&](int r, int c) {
    return double(before.values[size_t(r * before.stride + c)] + x.row(r)[c]);
  });
}

bool softcap_is_right(const Level& level) {
  constexpr int kWidth = 5003;
  Step step(kRows);
  step.set_logits_width(kWidth);
  const std::vector<float> before = Random(9).normals(step.logits.size());
  for (size_t i = 0; i < before.size(); ++i) step.logits[i] = before[i] * 40.0f;
  SoftcapLaunch launch{};
  launch.width = kWidth;
  launch.cap = 30.0f;
  level.run(launch, step, true);
  for (size_t i = 0; i < before.size(); ++i) {
    if (!near(step.logits[i], 30.0 * std::tanh(double(before[i] * 40.0f) / 30.0), 1e-5)) return false;
  }
  return true;
}

}  // namespace

void check_rows(const Level& level) {
  for (const int width : kWidths) {
    const std::string of = " of " + std::to_string(width);
    level.line("RMS norm" + of, norm_is_right(level, width, false));
    level.line("layer norm" + of, norm_is_right(level, width, true));
    level.line("quantise" + of, quantise_is_right(level, width));
    level.line("add" + of, add_is_right(level, width));
  }
  level.line("silu", activation_is_right(level, Activation::silu, silu));
  level.line("gelu", activation_is_right(level, Activation::gelu, gelu));
  level.line("gelu_tanh", activation_is_right(level, Activation::gelu_tanh, gelu_tanh));
  level.line("soft cap of logits", softcap_is_right(level));
}

}  // namespace check
