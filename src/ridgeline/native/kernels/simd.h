// Sixteen lanes of float32 or int32 under one set of names, whatever the instruction set. A backend defines
//   vfloat, vint, vmask                           values of 16 lanes
//   kMaxTokens, kMaxTiles, kMaxQueries            rows, and tiles of weights, in a register tile of the linear
//                                                 kernels; queries in one of the attention kernels
//   first_lanes(n), lanes(from, to)               masks; n, from and to are clamped to 0..16
//   mask_bits, mask_of                            a mask as 16 bits, the first lane's lowest, and back
//   zero, splat, load, store                      float32; with a mask, other lanes are neither read nor
//   written
//   + - * / min max abs copy_sign fma round_even  float32; fma may round twice where the hardware has none,
//   kRoundsOnce                                   which kRoundsOnce denies
//   less, select, reduce_add, reduce_max          reductions have one fixed order
//   izero, isplat, iload, istore, add, sub, multiply, max, bit_and, bit_or, shift_left, shift_right
//                                                 int32; to the right fills up with zeros
//   load_bytes, load_signed_bytes                 16 bytes as int32
//   to_int, truncate, to_float,                   to_int rounds to nearest even
//   times_power_of_two
//   load_f16, load_bf16, bf16_bits                16 values of a half format; bf16 rounds to nearest even
//   store_weights                                 16 numbers, none of them denormal, as bfloat16
//   interleave                                    the lanes of two vectors in turn, in place
//   byte_fields<shift, bits>                      bits of each of 64 bytes, moved down
//   load_table, look_up                           16 bytes, picked from by 64 indices below 16
//   dot                                           64 bytes up to 127 times four signed ones per lane, exact
//   dot_bytes, kByteZero                          the same for any bytes, each less kByteZero, which is 0 or
//                                                 128; no signed one is -128
//   dot_bf16, kFastBf16Dot                        adds the products of 16 pairs of bfloat16; how it rounds is
//                                                 the backend's; fast where it is one instruction
//   store_codes                                   16 int32 as int8, saturated
//   store_chosen, kCompresses                     the lanes of a mask side by side; may write all 16; whether
//                                                 that takes an instruction, and not one for each lane
//   prefetch, prefetch_near                       into the second-level cache, and the first
// Every function is inlined: a kernel's object file must hold no code that another ISA level could link to.
#pragma once

#include "../layout.h"

#define RIDGELINE_BEGIN \
  namespace ridgeline { \
  namespace RIDGELINE_ISA {
#define RIDGELINE_END \
  }                   \
  }

#if defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

#if !defined(__AVX512VNNI__)
RIDGELINE_BEGIN

constexpr bool kCompresses = false;

template <class T>
RIDGELINE_INLINE void store_lanes(unsigned chosen, T* p, const T (&lanes)[16]) {
  for (; chosen != 0; chosen &= chosen - 1) *p++ = lanes[__builtin_ctz(chosen)];
}
RIDGELINE_INLINE void store_chosen(vmask m, float* p, vfloat a) {
  float lanes[16];
  store(lanes, a);
  store_lanes(mask_bits(m), p, lanes);
}
RIDGELINE_INLINE void store_chosen(vmask m, int32_t* p, vint a) {
  int32_t lanes[16];
  istore(lanes, a);
  store_lanes(mask_bits(m), p, lanes);
}

RIDGELINE_END
#endif
