// Memory layouts of activations and sequence memory that kernels and the Python side share; storage.h has those
// of weights. This is their only description.
//
// A8 row: int8 codes [groups*32], float32 scales [groups], int32 sums of 16 codes [groups][2], float32
//   scale * sum of all 32 [groups]; rows are a multiple of 64 bytes apart.
// Bfloat16 row: the values, and a zero after them where their number is odd; rows are a multiple of 64 bytes
//   apart.
// Routes: for each row its experts as int32, their scores as float32 and, where the width is odd, one score
//   more; after room for all rows, what the experts' products share: the number of blocks (a line), the
//   blocks, and the step's pairs of a row and one of its experts, row * chosen + k, by expert and then row.
// KV page of one head: K, then V as [16 slots][head_dim]. In bfloat16 K lies as [head_dim/2][16 slots][2],
//   else as [head_dim][16 slots]. In int8 a float32 scale of each slot's key follows the codes, and then one of
//   each slot's value: two lines, so that 16 bytes may be read from any code on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ridgeline {

#define RIDGELINE_INLINE static inline __attribute__((always_inline))
#define RIDGELINE_MEMBER inline __attribute__((always_inline))

constexpr int kTileRows = 16;
constexpr int kGroup = 32;
constexpr int kPageTokens = 16;
constexpr int kMaxHeadDim = 512;
constexpr size_t kLineBytes = 64;

RIDGELINE_INLINE constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
RIDGELINE_INLINE constexpr int tile_count(int rows) { return (rows + kTileRows - 1) / kTileRows; }
RIDGELINE_INLINE constexpr int group_count(int cols) { return (cols + kGroup - 1) / kGroup; }

// Where the arrays of an A8 row lie.
struct A8Layout {
  int groups;
  size_t scales, sums, scaled_sums, row_bytes;
};
RIDGELINE_INLINE constexpr A8Layout a8_layout(int width) {
  const size_t groups = size_t(group_count(width)), plane = groups * 4, codes = groups * kGroup;
  return {int(groups), codes, codes + plane, codes + 3 * plane, round_up(codes + 4 * plane, kLineBytes)};
}

// Most experts that there are: a kernel keeps their scores on its stack.
constexpr int kMaxExperts = 4096;

// Neighbours among the sorted pairs, all of one expert and at most kBlockPairs.
constexpr int kBlockPairs = 64;
struct RouteBlock {
  int32_t expert, begin, count;
};
// Where the arrays of a step's routes lie, counted in int32.
struct RoutesLayout {
  size_t blocks, pairs, ints;
};
RIDGELINE_INLINE constexpr RoutesLayout routes_layout(int64_t max_rows, int width) {
  const size_t rows = size_t(max_rows), most_pairs = rows * size_t(width / 2);
  const size_t blocks = rows * size_t(width) + kLineBytes / 4, pairs = blocks + 3 * most_pairs;
  return {blocks, pairs, pairs + most_pairs};
}

// How keys and values are stored.
enum class KvFormat : uint8_t { bf16, f32, int8 };

// Values of one head's page; the offset of V is half of it.
RIDGELINE_INLINE constexpr size_t page_values(int head_dim) { return size_t(2) * kPageTokens * head_dim; }

RIDGELINE_INLINE constexpr size_t page_bytes(KvFormat format, int head_dim) {
  const size_t values = page_values(head_dim);
  if (format == KvFormat::int8) return values + size_t(2) * kPageTokens * sizeof(float);
  return values * (format == KvFormat::f32 ? sizeof(float) : sizeof(uint16_t));
}

// What a page of one head holds of a slot: `planes` pieces of a key, kPageTokens pieces apart; a value.
struct SlotLayout {
  size_t piece_bytes, planes, value_bytes;
};
RIDGELINE_INLINE constexpr SlotLayout slot_layout(KvFormat format, int head_dim) {
  const size_t dims = size_t(head_dim);
  if (format == KvFormat::bf16) return {4, dims / 2, 2 * dims};
  return format == KvFormat::f32 ? SlotLayout{4, dims, 4 * dims} : SlotLayout{1, dims, dims};
}

// A slot of one page to one of another, of any heads.
template <size_t kPieceBytes>
RIDGELINE_INLINE void copy_key(size_t planes, const uint8_t* source, uint8_t* target) {
  for (size_t i = 0; i < planes; ++i)
    std::memcpy(target + i * kPageTokens * kPieceBytes, source + i * kPageTokens * kPieceBytes, kPieceBytes);
}
RIDGELINE_INLINE void copy_slot(KvFormat format, int head_dim, const uint8_t* source, int source_slot,
                                uint8_t* target, int target_slot) {
  const SlotLayout layout = slot_layout(format, head_dim);
  const size_t from = size_t(source_slot), to = size_t(target_slot), values = kPageTokens * layout.value_bytes;
  if (layout.piece_bytes == 1)
    copy_key<1>(layout.planes, source + from, target + to);
  else
    copy_key<4>(layout.planes, source + 4 * from, target + 4 * to);
  std::memcpy(target + values + to * layout.value_bytes, source + values + from * layout.value_bytes,
              layout.value_bytes);
  if (format != KvFormat::int8) return;
  for (size_t scales = 2 * values; scales < page_bytes(format, head_dim); scales += kPageTokens * sizeof(float))
    std::memcpy(target + scales + to * sizeof(float), source + scales + from * sizeof(float), sizeof(float));
}

}  // namespace ridgeline
