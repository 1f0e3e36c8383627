// The vocabulary of simd.h, operation by operation, against plain loops. Compiled once per level.
#include "kernels/simd.h"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>

#include "check.h"
#include "team.h"

#define RIDGELINE_TEXT(x) #x
#define RIDGELINE_NAME(x) RIDGELINE_TEXT(x)

RIDGELINE_BEGIN

namespace {

using check::Random;

struct Lanes {
  float x[16];
  float operator[](int i) const { return x[i]; }
};
struct IntLanes {
  int32_t x[16];
  int32_t operator[](int i) const { return x[i]; }
  uint8_t byte(int i) const { return uint8_t(uint32_t(x[i / 4]) >> (8 * (i % 4))); }
};
Lanes out(vfloat a) {
  Lanes lanes;
  store(lanes.x, a);
  return lanes;
}
IntLanes out(vint a) {
  return std::bit_cast<IntLanes>(out(from_bits(a)));
}
vfloat in(const Lanes& lanes) { return load(lanes.x); }
vint in(const IntLanes& lanes) { return iload(lanes.x); }

Lanes random_floats(Random& random) {
  Lanes lanes;
  for (float& x : lanes.x) x = random.normal() * 100.0f;
  return lanes;
}
IntLanes random_ints(Random& random) {
  IntLanes lanes;
  for (int32_t& x : lanes.x) x = int32_t(random.bits());
  return lanes;
}

template <class F>
bool every_lane(F&& f) {
  for (int i = 0; i < 16; ++i) {
    if (!f(i)) return false;
  }
  return true;
}

bool arithmetic() {
  Random random(1);
  for (int round = 0; round < 100; ++round) {
    const Lanes a = random_floats(random), b = random_floats(random), c = random_floats(random);
    const vfloat x = in(a), y = in(b);
    const Lanes sum = out(x + y), difference = out(x - y), product = out(x * y), quotient = out(x / y);
    const Lanes lesser = out(min(x, y)), greater = out(max(x, y)), size = out(abs(x)), sign = out(copy_sign(x, y));
    const Lanes chosen = out(select(less(x, y), x, in(c))), fused = out(fma(x, y, in(c)));
    const bool right = every_lane([&](int i) {
      const double exact = double(a[i]) * double(b[i]) + double(c[i]);
      return sum[i] == a[i] + b[i] && difference[i] == a[i] - b[i] && product[i] == a[i] * b[i] &&
             quotient[i] == a[i] / b[i] && lesser[i] == std::min(a[i], b[i]) &&
             greater[i] == std::max(a[i], b[i]) && size[i] == std::abs(a[i]) &&
             sign[i] == std::copysign(a[i], b[i]) && chosen[i] == (a[i] < b[i] ? a[i] : c[i]) &&
             check::near(fused[i], exact, std::abs(double(a[i]) * double(b[i])) * 1.2e-7 + 1e-5);
    });
    if (!right) return false;
  }
  const Lanes number = out(splat(3.0f)), nan = out(max(splat(NAN), splat(3.0f))), also = out(min(splat(NAN), splat(3.0f)));
  return every_lane([&](int i) { return nan[i] == number[i] && also[i] == number[i]; }) &&
         std::isnan(out(max(splat(3.0f), splat(NAN)))[0]);
}

bool reductions() {
  Random random(2);
  for (int round = 0; round < 100; ++round) {
    const Lanes a = random_floats(random);
    const IntLanes b = random_ints(random);
    float s[16], top = a[0];
    int32_t largest = b[0];
    for (int i = 0; i < 16; ++i) {
      s[i] = a[i];
      top = std::max(top, a[i]);
      largest = std::max(largest, b[i]);
    }
    for (int n = 8; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) s[i] += s[i + n];
    }
    if (reduce_add(in(a)) != s[0] || reduce_max(in(a)) != top) return false;
    const IntLanes small = out(shift_right<8>(in(b)));
    int32_t small_sum = 0;
    for (int i = 0; i < 16; ++i) small_sum += small[i];
    if (reduce_add(shift_right<8>(in(b))) != small_sum || reduce_max(in(b)) != largest) return false;
  }
  return true;
}

bool conversions() {
  for (int start = -40000; start < 40000; start += 16) {
    Lanes a;
    for (int i = 0; i < 16; ++i) a.x[i] = float(start + i) * 0.125f;
    const IntLanes to = out(to_int(in(a)));
    const Lanes even = out(round_even(in(a))), back = out(to_float(to_int(in(a))));
    if (!every_lane([&](int i) {
          const float expected = std::nearbyint(a[i]);
          return to[i] == int32_t(expected) && even[i] == expected && back[i] == expected;
        })) {
      return false;
    }
  }
  for (uint32_t set = 0; set < 0x10000; set += 37) {
    if (mask_bits(mask_of(set)) != set) return false;
    const Lanes where = out(select(mask_of(set), splat(1.0f), splat(2.0f)));
    if (!every_lane([&](int i) { return where[i] == ((set >> i & 1) != 0 ? 1.0f : 2.0f); })) return false;
  }
  const IntLanes cut = out(truncate(in(Lanes{{0.0f, 0.5f, 1.0f, 1.5f, 2.9999998f, 8388609.0f, 1073741824.0f, 16777216.0f,
                                              3.0f, 4.7f, 5.2f, 6.9f, 100.5f, 65535.9f, 65536.1f, 2147483520.0f}})));
  const int32_t whole[16] = {0, 0, 1, 1, 2, 8388609, 1073741824, 16777216, 3, 4, 5, 6, 100, 65535, 65536, 2147483520};
  if (!every_lane([&](int i) { return cut[i] == whole[i]; })) return false;
  for (int n = -126; n <= 127; ++n) {
    if (out(times_power_of_two(splat(1.5f), splat(float(n))))[0] != std::ldexp(1.5f, n)) return false;
  }
  return true;
}

bool integers() {
  Random random(3);
  for (int round = 0; round < 100; ++round) {
    const IntLanes a = random_ints(random), b = random_ints(random);
    const vint x = in(a), y = in(b);
    const IntLanes sum = out(add(x, y)), difference = out(sub(x, y)), product = out(multiply(x, y)),
                   greater = out(max(x, y)), both = out(bit_and(x, y)), either = out(bit_or(x, y)),
                   left = out(shift_left<7>(x)), right = out(shift_right<7>(x));
    const IntLanes bytes = out(load_bytes(a.x)), signed_bytes = out(load_signed_bytes(a.x));
    if (!every_lane([&](int i) {
          const uint32_t u = uint32_t(a[i]), v = uint32_t(b[i]);
          return uint32_t(sum[i]) == u + v && uint32_t(difference[i]) == u - v && uint32_t(product[i]) == u * v &&
                 greater[i] == std::max(a[i], b[i]) && uint32_t(both[i]) == (u & v) &&
                 uint32_t(either[i]) == (u | v) && uint32_t(left[i]) == u << 7 && uint32_t(right[i]) == u >> 7 &&
                 bytes[i] == a.byte(i) && signed_bytes[i] == int8_t(a.byte(i));
        })) {
      return false;
    }
    int32_t stored[17] = {};
    istore(stored + 1, x);
    if (!every_lane([&](int i) { return stored[i + 1] == a[i]; })) return false;
    int8_t codes[16];
    store_codes(codes, in(a));
    if (!every_lane([&](int i) { return codes[i] == std::min(127, std::max(-128, a[i])); })) return false;
    store_codes(codes, sub(isplat(round * 3), isplat(150)));
    if (codes[7] != std::min(127, std::max(-128, round * 3 - 150))) return false;
  }
  return true;
}

template <int kShift, int kBits>
bool fields_are_right(const IntLanes& a) {
  const IntLanes fields = out(byte_fields<kShift, kBits>(in(a)));
  for (int i = 0; i < 64; ++i) {
    if (fields.byte(i) != (a.byte(i) >> kShift & ((1 << kBits) - 1))) return false;
  }
  return true;
}

bool bytes() {
  Random random(4);
  for (int round = 0; round < 100; ++round) {
    const IntLanes a = random_ints(random), table = random_ints(random);
    if (!fields_are_right<0, 4>(a) || !fields_are_right<4, 4>(a) || !fields_are_right<2, 2>(a) ||
        !fields_are_right<6, 2>(a) || !fields_are_right<7, 1>(a) || !fields_are_right<0, 7>(a)) {
      return false;
    }
    const IntLanes found = out(look_up(load_table(table.x), byte_fields<1, 4>(in(a))));
    for (int i = 0; i < 64; ++i) {
      if (found.byte(i) != table.byte(a.byte(i) >> 1 & 15)) return false;
    }
  }
  return true;
}

// Products of unsigned bytes, each less `zero`, and signed ones.
bool is_dot(const IntLanes& seen, const IntLanes& sum, const IntLanes& a, const IntLanes& b, int zero) {
  return every_lane([&](int i) {
    int32_t expected = sum[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) expected += (int(a.byte(j)) - zero) * int(int8_t(b.byte(j)));
    return seen[i] == expected;
  });
}

uint32_t four(int byte) { return uint32_t(byte & 0xff) * 0x01010101u; }

bool dot_products() {
  Random random(5);
  for (int x = 0; x < 256; ++x) {
    for (int y = -128; y < 128; ++y) {
      IntLanes a = random_ints(random), b = random_ints(random), sum = random_ints(random);
      for (int i = 0; i < 16; ++i) {
        sum.x[i] /= 4;
        if (i % 2 == 0) a.x[i] = int32_t(four(x)), b.x[i] = int32_t(four(y));  // extremes, four at once
        for (int shift = 0; shift < 32; shift += 8) {
          if ((uint32_t(b.x[i]) >> shift & 0xff) == 0x80 && i % 2 == 1) b.x[i] ^= int32_t(1u << shift);
        }
      }
      const bool least = y == -128;
      if (!least && !is_dot(out(dot_bytes(in(sum), in(a), in(b))), sum, a, b, kByteZero)) return false;
      const IntLanes low = out(byte_fields<0, 7>(in(a)));
      if (!is_dot(out(dot(in(sum), in(low), in(b))), sum, low, b, 0)) return false;
    }
  }
  const int8_t codes[4] = {-127, 5, 127, -1};
  const IntLanes same = out(splat_codes(codes));
  return every_lane([&](int i) {
    return same.byte(4 * i) == 0x81 && same.byte(4 * i + 1) == 5 && same.byte(4 * i + 2) == 127 &&
           same.byte(4 * i + 3) == 0xff;
  });
}

float widened_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction == 0 ? sign * INFINITY : NAN;
  return sign * (exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(fraction + 1024), exponent - 25));
}
uint16_t rounded_bf16(float a) {
  const uint32_t x = std::bit_cast<uint32_t>(a);
  if (std::isnan(a)) return uint16_t((x | 0x400000) >> 16);
  return uint16_t((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

// Every value of 16 bits: subnormal halves become normal floats.
bool half_floats() {
  for (uint32_t start = 0; start < 0x10000; start += 16) {
    uint16_t h[16];
    for (uint32_t i = 0; i < 16; ++i) h[i] = uint16_t(start + i);
    const Lanes f16 = out(load_f16(h)), bf16 = out(load_bf16(h));
    if (!every_lane([&](int i) {
          const float expected = widened_f16(h[i]);
          const bool same = std::isnan(expected) ? std::isnan(f16[i])
                                                 : std::bit_cast<uint32_t>(f16[i]) == std::bit_cast<uint32_t>(expected);
          return same && std::bit_cast<uint32_t>(bf16[i]) == uint32_t(h[i]) << 16;
        })) {
      return false;
    }
  }
  Random random(6);
  for (int round = 0; round < 2000; ++round) {
    const IntLanes bits = random_ints(random);
    const Lanes a = std::bit_cast<Lanes>(bits);
    uint16_t halves[16];
    store_bf16(first_lanes(16), halves, in(a));
    if (!every_lane([&](int i) { return halves[i] == rounded_bf16(a[i]); })) return false;
    const IntLanes others = random_ints(random);
    vfloat first = in(a), second = in(std::bit_cast<Lanes>(others));
    interleave(first, second);
    const IntLanes low = out(ridgeline::RIDGELINE_ISA::bits(first)), high = out(ridgeline::RIDGELINE_ISA::bits(second));
    if (!every_lane([&](int i) {
          const IntLanes& from = i % 2 == 0 ? bits : others;
          return low[i] == from[i / 2] && high[i] == from[8 + i / 2];
        })) {
      return false;
    }
  }
  return true;
}

bool bf16_products() {
  Random random(7);
  for (int round = 0; round < 100; ++round) {
    uint16_t a[32], b[32];
    const Lanes sum = random_floats(random);
    for (int i = 0; i < 32; ++i) a[i] = rounded_bf16(random.normal()), b[i] = rounded_bf16(random.normal());
    const Lanes seen = out(dot_bf16(in(sum), iload(a), iload(b)));
    const auto wide = [](uint16_t half) { return double(std::bit_cast<float>(uint32_t(half) << 16)); };
    if (!every_lane([&](int i) {
          const double first = wide(a[2 * i]) * wide(b[2 * i]), second = wide(a[2 * i + 1]) * wide(b[2 * i + 1]);
          const double size = std::abs(double(sum[i])) + std::abs(first) + std::abs(second);
          return check::near(seen[i], double(sum[i]) + first + second, size * 3e-7);
        })) {
      return false;
    }
  }
  return true;
}

// Memory between two pages that may not be touched.
class Guarded {
 public:
  Guarded() : page_(size_t(sysconf(_SC_PAGESIZE))) {
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, 3 * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_, page_, PROT_NONE);
    mprotect(base_ + 2 * page_, page_, PROT_NONE);
  }
  ~Guarded() { munmap(base_, 3 * page_); }
  uint8_t* begin() const { return base_ + page_; }
  uint8_t* end() const { return base_ + 2 * page_; }

 private:
  const size_t page_;
  uint8_t* base_;
};

// Lanes [from, to) of the sixteen values at p, of which the others may lie outside of the memory.
bool masked(vmask m, int from, int to, float* p, uint16_t* h) {
  const auto inside = [&](int i) { return i >= from && i < to; };
  for (int i = from; i < to; ++i) p[i] = float(i + 1);
  const Lanes floats = out(load(m, p));
  for (int i = from; i < to; ++i) p[i] = -1.0f;
  Lanes values;
  for (int i = 0; i < 16; ++i) values.x[i] = float(2 * i);
  store(m, p, in(values));
  bool right = every_lane([&](int i) {
    return floats[i] == (inside(i) ? float(i + 1) : 0.0f) && (!inside(i) || p[i] == float(2 * i));
  });
  for (int i = from; i < to; ++i) h[i] = rounded_bf16(float(i + 1));
  const Lanes halves = out(load_bf16(m, h));
  store_bf16(m, h, in(values));
  return right && every_lane([&](int i) {
           return halves[i] == (inside(i) ? float(i + 1) : 0.0f) && (!inside(i) || h[i] == rounded_bf16(float(2 * i)));
         });
}

bool masks() {
  const Guarded memory;
  for (int from = 0; from <= 16; ++from) {
    for (int to = from; to <= 16; ++to) {
      auto *first = reinterpret_cast<float*>(memory.begin()) - from, *last = reinterpret_cast<float*>(memory.end()) - to;
      auto *first_half = reinterpret_cast<uint16_t*>(memory.begin()) - from,
           *last_half = reinterpret_cast<uint16_t*>(memory.end()) - to;
      if (!masked(lanes(from, to), from, to, first, first_half)) return false;
      if (!masked(lanes(from, to), from, to, last, last_half)) return false;
      if (from == 0 && !masked(first_lanes(to), 0, to, last, last_half)) return false;
    }
  }
  // Lanes outside of the mask keep what they held.
  float around[16];
  for (float& x : around) x = 5.0f;
  store(lanes(3, 9), around, splat(1.0f));
  const Lanes none = out(select(first_lanes(-3), splat(1.0f), splat(2.0f))),
              all = out(select(lanes(-5, 99), splat(1.0f), splat(2.0f)));
  return every_lane([&](int i) {
    return around[i] == (i >= 3 && i < 9 ? 1.0f : 5.0f) && none[i] == 2.0f && all[i] == 1.0f;
  });
}

bool small_numbers_are_flushed() {
  volatile float tiny = 1e-38f;
  return out(splat(tiny) * splat(0.01f))[0] == 0.0f;
}

void run(check::Report& report) {
  const FloatState state;  // as on the threads that compute
  const auto line = [&](const char* what, bool ok) { report.line(RIDGELINE_NAME(RIDGELINE_ISA), what, ok); };
  line("arithmetic", arithmetic());
  line("reductions", reductions());
  line("conversions", conversions());
  line("integers", integers());
  line("bytes and tables", bytes());
  line("dot products of bytes", dot_products());
  line("half floats", half_floats());
  line("products of bfloat16", bf16_products());
  line("masks at the ends of memory", masks());
  line("denormals", small_numbers_are_flushed());
}

const bool registered = [] {
  check::register_simd_check(RIDGELINE_NAME(RIDGELINE_ISA), run);
  return true;
}();

}  // namespace

RIDGELINE_END
