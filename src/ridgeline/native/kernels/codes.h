// Codes and scales of quantised tiles, from memory into registers.
#pragma once

#include "tile.h"
#include "unrolled.h"

RIDGELINE_BEGIN

// kBits bits of each of 64 bytes, moved from bit kFrom to bit kTo, other bits cleared.
template <int kFrom, int kBits, int kTo>
RIDGELINE_INLINE vint moved_fields(vint a) {
  const vint mask = isplat(int32_t(0x01010101u * (((1u << kBits) - 1) << kTo)));
  if constexpr (kFrom > kTo) return bit_and(shift_right<kFrom - kTo>(a), mask);
  if constexpr (kFrom < kTo) return bit_and(shift_left<kTo - kFrom>(a), mask);
  return bit_and(a, mask);
}

// Chunk `kChunk` of a group whose codes have kBits bits, from its planes beginning with kPlane.
template <int kBits, int kChunk, Plane kPlane = first_plane(kBits)>
RIDGELINE_INLINE vint join_planes(const uint8_t* group) {
  constexpr int kPerLine = 8 / kPlane.bits;
  const vint line = iload(group + kLineBytes * (plane_line(kBits, kPlane) + kChunk / kPerLine));
  if constexpr (kPlane.bits == 8) {
    return line;
  } else {
    constexpr Plane kNext = next_plane(kBits, kPlane);
    const vint code = moved_fields<kChunk % kPerLine * kPlane.bits, kPlane.bits, kPlane.first>(line);
    if constexpr (kNext.bits == 0) {
      return code;
    } else {
      return bit_or(code, join_planes<kBits, kChunk, kNext>(group));
    }
  }
}

// Inputs 4*kChunk + {0..3} of a group, 16 rows of unsigned codes or of what they look up.
template <Storage kStorage, int kChunk>
RIDGELINE_INLINE vint load_chunk(const uint8_t* group) {
  constexpr Traits kTraits = traits(kStorage);
  const vint code = join_planes<kTraits.bits == 0 ? 8 : kTraits.bits, kChunk>(group);
  if constexpr (kTraits.levels == Levels::uneven) return look_up(load_table(kUnevenLevels), code);
  if constexpr (kTraits.levels == Levels::e2m1) return look_up(load_table(kE2m1Levels), code);
  return code;
}

RIDGELINE_INLINE void istore(uint8_t* p, vint a) { store(reinterpret_cast<float*>(p), from_bits(a)); }

// The lines of a header as bytes. Those that are bytes already are copied, so that memory is read in order.
template <Storage kStorage>
RIDGELINE_INLINE void unpack_lines(const uint8_t* packed, uint8_t* out) {
  constexpr int kBits = line_bits(kStorage), kVectors = header_lines(kStorage) / 4, kHalf = kVectors / 2;
  if constexpr (kBits == 8) {
    for (int i = 0; i < kVectors; ++i) istore(out + kLineBytes * i, iload(packed + kLineBytes * i));
    return;
  }
  static_assert(kBits != 6 || kVectors == 4);
  const vint twos = iload(packed + kLineBytes * kHalf);
  unrolled<kHalf>([&](auto index) RIDGELINE_INLINED {
    constexpr int i = index;
    const vint both = iload(packed + kLineBytes * i);
    vint low = moved_fields<0, 4, 0>(both), high = moved_fields<4, 4, 0>(both);
    if constexpr (kBits == 6) {
      low = bit_or(low, moved_fields<2 * i, 2, 4>(twos));
      high = bit_or(high, moved_fields<2 * (kHalf + i), 2, 4>(twos));
    }
    istore(out + kLineBytes * i, low);
    istore(out + kLineBytes * (kHalf + i), high);
  });
}

// What the halves of a byte are in base 27 (the high one times 16), and numbers below 9 in base 3.
alignas(16) constexpr uint8_t kTwentySevens[16] = {0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 8};
alignas(16) constexpr uint8_t kOver27[16] = {0, 16, 5, 21, 10, 26, 15, 4, 20, 9, 25, 14, 3, 19, 8, 24};
alignas(16) constexpr uint8_t kThrees[16] = {0, 0, 0, 1, 1, 1, 2, 2, 2};
alignas(16) constexpr uint8_t kOver3[16] = {0, 1, 2, 0, 1, 2, 0, 1, 2};

// 1 in each byte, all below 64, that is at least kLeast (of 1 to 32), and 0 in the others.
template <int kLeast>
RIDGELINE_INLINE vint at_least(vint bytes) {
  return moved_fields<5, 1, 0>(add(bytes, isplat(0x01010101 * (32 - kLeast))));
}

// The five digits in base 3 of each of 64 bytes below 243, the highest first. No sum here leaves its byte.
RIDGELINE_INLINE void unpack_digits(vint bytes, vint* digits) {
  const vint threes = load_table(kThrees), over = load_table(kOver3);
  const vint high = moved_fields<4, 4, 0>(bytes);
  const vint sum = add(look_up(load_table(kOver27), high), moved_fields<0, 4, 0>(bytes));
  const vint carry = at_least<27>(sum);
  const vint upper = add(look_up(load_table(kTwentySevens), high), carry);
  const vint lower = sub(sum, multiply(carry, isplat(27)));
  const vint nines = add(at_least<9>(lower), at_least<18>(lower));
  const vint lowest = sub(lower, multiply(nines, isplat(9)));
  digits[0] = look_up(threes, upper);
  digits[1] = look_up(over, upper);
  digits[2] = nines;
  digits[3] = look_up(threes, lowest);
  digits[4] = look_up(over, lowest);
}

// The chunks of a block of digits, a line each. The fifth of the last line does not exist.
RIDGELINE_INLINE void unpack_digit_block(const uint8_t* packed, uint8_t* out) {
  constexpr int kChunks = kSuperBlock / 4;
  for (int first = 0; first < kChunks; first += 5, packed += kLineBytes) {
    vint digits[5];
    unpack_digits(iload(packed), digits);
    for (int i = 0; i < 4; ++i) istore(out + kLineBytes * (first + i), digits[i]);
    if (first + 4 < kChunks) istore(out + kLineBytes * (first + 4), digits[4]);
  }
}

// What a block of 256 inputs has for all of its groups.
template <Storage kStorage>
struct SuperBlock {
  static constexpr Traits kTraits = traits(kStorage);
  static constexpr bool kDigits = kTraits.bits == 0;
  static constexpr int kLines = header_lines(kStorage);

  vfloat scale, minimum;  // what integer scales and minima are multiplied by; the latter are subtracted
  // Integer scales, then minima, a line of 16 rows each; or the codes of ternary digits.
  alignas(64) uint8_t unpacked[kTileRows * (kDigits ? kSuperBlock : kLines > 0 ? kLines : 1)];

  RIDGELINE_MEMBER void open(const uint8_t* block) {
    scale = load_f16(reinterpret_cast<const uint16_t*>(block));
    if constexpr (kTraits.minimum == Minimum::integer) {
      minimum = zero() - load_f16(reinterpret_cast<const uint16_t*>(block) + kTileRows);
    }
    if constexpr (kLines > 0) unpack_lines<kStorage>(block + lines_place(kStorage), unpacked);
    if constexpr (kDigits) unpack_digit_block(block + header_bytes(kStorage), unpacked);
  }

  // The integer scales of 16 rows: `index` counts the groups that have one.
  RIDGELINE_MEMBER vfloat scales(int index) const {
    const uint8_t* line = unpacked + kTileRows * index;
    if constexpr (kTraits.scale == Scale::signed_bytes) return to_float(load_signed_bytes(line));
    if constexpr (kTraits.scale_zero == 0) return to_float(load_bytes(line));
    return to_float(sub(load_bytes(line), isplat(kTraits.scale_zero)));
  }
  RIDGELINE_MEMBER vfloat minima(int index) const {
    return to_float(load_bytes(unpacked + kTileRows * (scale_lines(kStorage) + index)));
  }
};

template <Storage kStorage>
RIDGELINE_INLINE vfloat load_scales(const uint8_t* scales) {
  if constexpr (traits(kStorage).scale == Scale::exponent) {
    // 2**(e - 128): what would be a subnormal is zero, as it is to all arithmetic here.
    return from_bits(shift_left<23>(max(sub(load_bytes(scales), isplat(1)), izero())));
  } else {
    return load_f16(reinterpret_cast<const uint16_t*>(scales));
  }
}

RIDGELINE_END
