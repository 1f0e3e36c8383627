// How weights lie in memory: what packing writes and the linear kernels read. This is their only description.
//
// Packed matrix: tiles of 16 output rows, one after the other, each one run of memory that is read from its
// start to its end. Missing rows of the last tile are zeros.
//   bfloat16 tile: for each pair of inputs 16 pairs; a last input without a partner has a zero.
//   float32 tile: for each input 16 floats. It holds F32 and F16.
//   quantised tile: blocks of a header and the codes that belong to it.
//
// Codes. The codes of a group of 32 inputs are 8 chunks of four inputs. A chunk is 64 bytes, byte r*4+i of
// which belongs to row r and its input i, so that it is 16 lanes of four inputs. A code is cut into planes of
// 8, 4, 2 and 1 bits, its lowest bits in the widest plane; planes follow one another, the narrowest first, so
// that they are read more or less in the order of memory. A 64-byte line of a plane of n bits holds 8/n
// chunks, the first in the lowest n bits of each byte. Ternary codes of no whole number of bits (TQ1_0) are
// digits in base 3: line l of a block holds chunks 5l to 5l+4, a byte being the number of five digits whose
// highest belongs to the first.
//
// Headers. A block of storages with a float scale for each group of 32 has 16 scales for each of its groups,
// then 16 minima where there are any; it is of one group (with minima), two (float16 scales) or four
// (exponents of a byte). The last block of a row may have fewer groups and still has a whole header.
// A block of 256 inputs has its 16 scales in float16, then 16 float16 by which minima are multiplied, then the
// integer scales of all its groups, then their minima, each a line of 16 bytes. Those of 4 and 6 bits lie in
// planes too: of n lines the first n/2 are the low halves of the bytes of n/2 lines, and the others the high
// halves; then come the fifth and sixth bits, where the lowest two of n/4 lines belong to the first n/4.
// A header is filled up to 64 bytes where that costs next to nothing, to keep the lines of codes aligned.
#pragma once

#include <type_traits>
#include <utility>

#include "layout.h"

namespace ridgeline {

enum class Storage : uint8_t {
  q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, mxfp4,         // blocks of 32
  q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs, tq1_0, tq2_0,  // blocks of 256
  f32, f16, bf16,                                      // after all that are quantised
};

inline constexpr std::pair<const char*, Storage> kStorages[] = {
    {"Q4_0", Storage::q4_0},   {"Q4_1", Storage::q4_1},     {"Q5_0", Storage::q5_0},
    {"Q5_1", Storage::q5_1},   {"Q8_0", Storage::q8_0},     {"IQ4_NL", Storage::iq4_nl},
    {"MXFP4", Storage::mxfp4}, {"Q2_K", Storage::q2_k},     {"Q3_K", Storage::q3_k},
    {"Q4_K", Storage::q4_k},   {"Q5_K", Storage::q5_k},     {"Q6_K", Storage::q6_k},
    {"TQ1_0", Storage::tq1_0}, {"IQ4_XS", Storage::iq4_xs}, {"TQ2_0", Storage::tq2_0},
    {"F32", Storage::f32},     {"F16", Storage::f16},       {"BF16", Storage::bf16},
};

RIDGELINE_INLINE constexpr bool is_quantised(Storage s) { return s < Storage::f32; }

constexpr int kSuperBlock = 256;
constexpr int kSuperGroups = kSuperBlock / kGroup;

// What a code looks up: itself, or a value of a table.
enum class Levels : uint8_t { linear, uneven, e2m1 };
// What the codes of a group are multiplied by. The last three are integers, multiplied by the float16 of
// their block of 256: of 4 bits, of 6, and of 8 with a sign (into which the 6 of IQ4_XS are widened).
enum class Scale : uint8_t { half, exponent, nibbles, sixes, signed_bytes };
// Added to each value: a float16, or an integer of the scales' width times minus the block's second float16.
enum class Minimum : uint8_t { none, half, integer };

struct Traits {
  int bits;  // of a code; 0 for digits in base 3
  int zero;  // subtracted from a code, or from what it looks up
  Levels levels;
  int group;  // neighbouring inputs that share a scale
  Scale scale;
  int scale_zero;  // subtracted from a packed scale
  Minimum minimum;
  int file_inputs, file_bytes;  // of a block as files have it
};

RIDGELINE_INLINE constexpr Traits traits(Storage s) {
  using enum Levels;
  using enum Scale;
  constexpr Minimum kNone = Minimum::none, kHalf = Minimum::half, kInteger = Minimum::integer;
  switch (s) {
    case Storage::q4_0: return {4, 8, linear, 32, half, 0, kNone, 32, 18};
    case Storage::q4_1: return {4, 0, linear, 32, half, 0, kHalf, 32, 20};
    case Storage::q5_0: return {5, 16, linear, 32, half, 0, kNone, 32, 22};
    case Storage::q5_1: return {5, 0, linear, 32, half, 0, kHalf, 32, 24};
    case Storage::q8_0: return {8, 128, linear, 32, half, 0, kNone, 32, 34};
    case Storage::iq4_nl: return {4, 128, uneven, 32, half, 0, kNone, 32, 18};
    case Storage::mxfp4: return {4, 12, e2m1, 32, exponent, 0, kNone, 32, 17};
    case Storage::q2_k: return {2, 0, linear, 16, nibbles, 0, kInteger, 256, 84};
    case Storage::q3_k: return {3, 4, linear, 16, sixes, 32, kNone, 256, 110};
    case Storage::q4_k: return {4, 0, linear, 32, sixes, 0, kInteger, 256, 144};
    case Storage::q5_k: return {5, 0, linear, 32, sixes, 0, kInteger, 256, 176};
    case Storage::q6_k: return {6, 32, linear, 16, signed_bytes, 0, kNone, 256, 210};
    case Storage::iq4_xs: return {4, 128, uneven, 32, signed_bytes, 0, kNone, 256, 136};
    case Storage::tq1_0: return {0, 1, linear, 256, half, 0, kNone, 256, 54};
    case Storage::tq2_0: return {2, 1, linear, 256, half, 0, kNone, 256, 66};
    case Storage::f16:
    case Storage::bf16: return {16, 0, linear, 1, half, 0, kNone, 1, 2};
    default: return {32, 0, linear, 1, half, 0, kNone, 1, 4};
  }
}

// The tables, plus the zero point: that of IQ4, and doubled E2M1.
alignas(16) constexpr uint8_t kUnevenLevels[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                   129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t kE2m1Levels[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

RIDGELINE_INLINE constexpr bool is_super(Storage s) { return traits(s).file_inputs == kSuperBlock; }
// Inputs of a row are a multiple of this; in the last group of 32 some may be unused.
RIDGELINE_INLINE constexpr int col_unit(Storage s) { return is_super(s) ? kSuperBlock : 1; }

// Groups of 32 inputs in a packed block.
RIDGELINE_INLINE constexpr int block_groups(Storage s) {
  if (is_super(s)) return kSuperGroups;
  return traits(s).scale == Scale::exponent ? 4 : traits(s).minimum == Minimum::half ? 1 : 2;
}
// Lines of integer scales, and of scales and minima, in the header of a block of 256.
RIDGELINE_INLINE constexpr int scale_lines(Storage s) {
  return !is_super(s) || traits(s).scale == Scale::half ? 0 : kSuperBlock / traits(s).group;
}
RIDGELINE_INLINE constexpr int header_lines(Storage s) {
  return scale_lines(s) * (traits(s).minimum == Minimum::integer ? 2 : 1);
}
RIDGELINE_INLINE constexpr int line_bits(Storage s) {
  return traits(s).scale == Scale::nibbles ? 4 : traits(s).scale == Scale::sixes ? 6 : 8;
}
// Where the lines of the header of a block of 256 begin.
RIDGELINE_INLINE constexpr size_t lines_place(Storage s) {
  return size_t(2 * kTileRows) * (traits(s).minimum == Minimum::integer ? 2 : 1);
}
RIDGELINE_INLINE constexpr size_t group_code_bytes(Storage s) { return kLineBytes * size_t(traits(s).bits); }
RIDGELINE_INLINE constexpr size_t block_code_bytes(Storage s) {
  if (traits(s).bits == 0) return kLineBytes * ((kSuperBlock / 4 + 4) / 5);
  return group_code_bytes(s) * block_groups(s);
}
RIDGELINE_INLINE constexpr size_t header_bytes(Storage s) {
  if (!is_super(s)) return kLineBytes;
  const size_t fields = lines_place(s) + size_t(header_lines(s)) * kTileRows * line_bits(s) / 8;
  const size_t aligned = round_up(fields, kLineBytes), file = size_t(traits(s).file_bytes) * kTileRows;
  return (aligned + block_code_bytes(s)) * 100 <= file * 102 ? aligned : fields;
}
RIDGELINE_INLINE constexpr size_t block_bytes(Storage s) { return header_bytes(s) + block_code_bytes(s); }

// Where a group of 32 of a quantised tile has its scales and its codes. In a block of 256 the former is the
// header, and the codes of TQ1_0 are those of the whole block.
struct GroupPlace {
  size_t scales, codes;
};
RIDGELINE_INLINE constexpr GroupPlace group_place(Storage s, int group) {
  const int groups = block_groups(s);
  const size_t block = size_t(group / groups) * block_bytes(s), within = size_t(group % groups);
  const size_t scales = is_super(s) ? 0 : within * (header_bytes(s) / groups);
  return {block + scales, block + header_bytes(s) + within * group_code_bytes(s)};
}
RIDGELINE_INLINE constexpr size_t tile_bytes(Storage s, int cols) {
  if (s == Storage::bf16) return round_up(size_t(cols), 2) * kTileRows * sizeof(uint16_t);
  if (!is_quantised(s)) return size_t(cols) * kTileRows * sizeof(float);
  if (is_super(s)) return size_t(cols / kSuperBlock) * block_bytes(s);
  return group_place(s, group_count(cols) - 1).codes + group_code_bytes(s);
}
// Bytes of a row as files have it; our own quantiser may leave the last block in part unused.
RIDGELINE_INLINE constexpr size_t file_row_bytes(Storage s, int cols) {
  const int inputs = traits(s).file_inputs;
  return (size_t(cols) + inputs - 1) / inputs * size_t(traits(s).file_bytes);
}

// A plane of the codes of a group: its bits are [first, first + bits) of each number.
struct Plane {
  int first, bits;
};
// The planes of numbers of `bits` bits, the widest first, end with one of no bits.
RIDGELINE_INLINE constexpr Plane next_plane(int bits, Plane p) {
  const int first = p.first + p.bits;
  for (int width = 8; width > 0; width /= 2) {
    if (first + width <= bits) return {first, width};
  }
  return {first, 0};
}
RIDGELINE_INLINE constexpr Plane first_plane(int bits) { return next_plane(bits, {0, 0}); }

// The line of a group of codes at which a plane begins: the narrower ones come before it.
RIDGELINE_INLINE constexpr int plane_line(int bits, Plane p) { return bits - p.first - p.bits; }

// body(std::integral_constant<Storage, storage>) for a quantised storage.
template <class Body>
RIDGELINE_INLINE void with_quantised(Storage storage, const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((storage == Storage(i) ? body(std::integral_constant<Storage, Storage(i)>{}) : void()), ...);
  }(std::make_integer_sequence<int, int(Storage::f32)>{});
}

}  // namespace ridgeline
