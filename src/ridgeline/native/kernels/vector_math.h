// exp, tanh and the activations on 16 lanes, from arithmetic alone: every ISA level uses the same
// polynomials, fitted by weighted least squares to a relative error below 6e-8.
#pragma once

#include "../launch.h"
#include "simd.h"

RIDGELINE_BEGIN

template <int kTerms>
RIDGELINE_INLINE vfloat polynomial(vfloat x, const float (&c)[kTerms]) {
  vfloat y = splat(c[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) y = fma(y, x, splat(c[i]));
  return y;
}

// Within 2 ulp. Exactly 1 at 0, exactly 0 below -87.34 (minus infinity included); saturates above 88.37.
RIDGELINE_INLINE vfloat exp(vfloat x) {
  const vfloat low = splat(-87.336544f);
  const vfloat in_range = max(low, min(splat(88.37626f), x));
  const vfloat n = round_even(in_range * splat(1.44269504f));
  // ln 2 in two parts; the first has so few bits that n times it is exact.
  vfloat r = fma(n, splat(-0.693145752f), in_range);
  r = fma(n, splat(-1.42860677e-6f), r);
  const float terms[] = {0.5f, 0.166666657f, 0.0416662954f, 0.00833349768f, 0.00139447593f, 0.000197902482f};
  const vfloat e = fma(r * r, polynomial(r, terms), r) + splat(1.0f);
  return select(less(x, low), zero(), times_power_of_two(e, n));
}

// 2 to the power of x, which is at most 0, within 2 ulp. Exactly 1 at 0, exactly 0 below -126.
RIDGELINE_INLINE vfloat exp2(vfloat x) {
  const vfloat low = splat(-126.0f);
  const vfloat in_range = max(low, x), n = round_even(in_range);
  const float terms[] = {1.0f, 0.693147004f, 0.240222424f, 0.0555073395f, 0.00967151392f, 0.00132647192f};
  return select(less(x, low), zero(), times_power_of_two(polynomial(in_range - n, terms), n));
}

RIDGELINE_INLINE vfloat tanh(vfloat x) {
  const vfloat size = abs(x), square = x * x;
  const float terms[] = {-0.333333284f, 0.133331627f,    -0.0539411269f,
                         0.0216693599f, -0.00809917413f, 0.00207101787f};
  const vfloat near = fma(x * square, polynomial(square, terms), x);
  const vfloat far = splat(1.0f) - splat(2.0f) / (exp(size + size) + splat(1.0f));
  return select(less(size, splat(0.625f)), near, copy_sign(far, x));
}

RIDGELINE_INLINE vfloat sigmoid(vfloat x) { return splat(1.0f) / (splat(1.0f) + exp(zero() - x)); }

// Distribution function of the standard normal: exp(-x^2/2) times a rational function on the negative side.
RIDGELINE_INLINE vfloat normal_cdf(vfloat x) {
  const vfloat size = min(abs(x), splat(14.5f));
  const vfloat t = splat(1.0f) / fma(splat(0.3f), size, splat(1.0f));
  const float terms[] = {7.37314485e-06f, 0.119484194f, 0.121945374f,  0.0945854038f, 0.142766431f,
                         -0.0768414438f,  0.228953421f, -0.169308305f, 0.0384075716f};
  const vfloat tail = exp(splat(-0.5f) * size * size) * polynomial(t, terms);
  return select(less(x, zero()), tail, splat(1.0f) - tail);
}

template <Activation kKind>
RIDGELINE_INLINE vfloat activated(vfloat x) {
  if constexpr (kKind == Activation::silu) return x * sigmoid(x);
  if constexpr (kKind == Activation::gelu) return x * normal_cdf(x);
  if constexpr (kKind == Activation::gelu_tanh) {
    const vfloat u = splat(1.59576912f) * fma(splat(0.044715f) * x, x * x, x);  // 2 sqrt(2 / pi)
    return x * sigmoid(u);
  }
  if constexpr (kKind == Activation::clamped_silu) {
    const vfloat gate = min(x, splat(7.0f));
    return gate * sigmoid(splat(1.702f) * gate);
  }
  return x;
}

// What a gate's activation is multiplied with.
template <Activation kKind>
RIDGELINE_INLINE vfloat gated(vfloat x) {
  if constexpr (kKind == Activation::clamped_silu)
    return max(splat(-7.0f), min(x, splat(7.0f))) + splat(1.0f);
  return x;
}

template <Activation kKind>
struct ActivationTag {
  static constexpr Activation kind = kKind;
};

// Calls f with the tag of a kind, so that loops over many values decide once.
template <class F>
RIDGELINE_INLINE void with_activation(Activation kind, F&& f) {
  switch (kind) {
    case Activation::silu: return f(ActivationTag<Activation::silu>{});
    case Activation::gelu: return f(ActivationTag<Activation::gelu>{});
    case Activation::gelu_tanh: return f(ActivationTag<Activation::gelu_tanh>{});
    case Activation::clamped_silu: return f(ActivationTag<Activation::clamped_silu>{});
    default: return f(ActivationTag<Activation::none>{});
  }
}

RIDGELINE_END
