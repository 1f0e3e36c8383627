// Packing, unpacking and linear layers of every storage.
#include <cstdio>

#include "check.h"
#include "pack.h"

namespace check {
namespace {

using namespace ridgeline;

constexpr int kRows = 37;     // of a matrix: not a multiple of a tile
constexpr int kTokens = 21;   // rows of activations: blocks of every size, and then some
constexpr int kColumns[] = {256, 1280};

struct PackedMatrix {
  Memory tiles;
  MatrixView view;
  std::vector<float> values;  // kRows x columns, as the kernels see them
};

// Inputs of a block of a file's format.
int block_inputs(Storage storage) {
  if (!is_quantised(storage)) return 1;
  return file_row_bytes(storage, 32) == file_row_bytes(storage, 256) ? 256 : 32;
}

// A block, or a float. Any bytes are codes; scales are drawn again where they are not finite, or huge.
void draw_block(Random& random, Storage storage, uint8_t* block) {
  if (is_quantised(storage)) {
    for (size_t i = 0; i < file_row_bytes(storage, block_inputs(storage)); ++i) block[i] = uint8_t(random.bits());
    return;
  }
  const float value = random.normal();
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t bf16 = uint16_t(bits >> 16), f16 = uint16_t(random.below(0x7800) | random.below(2) << 15);
  if (storage == Storage::f32) std::memcpy(block, &value, 4);
  if (storage == Storage::bf16) std::memcpy(block, &bf16, 2);
  if (storage == Storage::f16) std::memcpy(block, &f16, 2);
}

bool usable(const float* values, int count) {
  for (int i = 0; i < count; ++i) {
    if (!(std::abs(values[i]) < 1e6f)) return false;
  }
  return true;
}

PackedMatrix make_matrix(const Level& level, Storage storage, int rows, int columns, uint64_t seed) {
  Random random(seed);
  const size_t row_bytes = file_row_bytes(storage, columns);
  std::vector<uint8_t> file(row_bytes * size_t(rows));
  PackedMatrix matrix{Memory(size_t(tile_count(rows)) * tile_bytes(storage, columns)), {}, {}};
  matrix.view = {matrix.tiles.data(), storage, rows, columns};
  matrix.values.resize(size_t(rows) * size_t(columns));
  const int inputs = block_inputs(storage);
  const size_t block_bytes = file_row_bytes(storage, inputs);
  Memory single(tile_bytes(storage, inputs));
  for (int i = 0; i < rows * (columns / inputs); ++i) {
    uint8_t* block = file.data() + size_t(i) * block_bytes;
    float* values = matrix.values.data() + size_t(i) * size_t(inputs);
    do {
      draw_block(random, storage, block);
      pack_matrix(block, storage, 1, inputs, single.data(), *level.alone);
      level.kernels.unpack_row({single.data(), storage, 1, inputs}, 0, values);
    } while (is_quantised(storage) && !usable(values, inputs));
  }
  pack_matrix(file.data(), storage, rows, columns, matrix.tiles.data(), *level.pair);
  return matrix;
}

// FNV-1a. The values of a packed matrix must be the same on every machine.
uint64_t hash(const std::vector<float>& values) {
  uint64_t h = 0xcbf29ce484222325u;
  for (const float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    h = (h ^ bits) * 0x100000001b3u;
  }
  return h;
}

// Everything that a linear launch reads, so that it can be run on some of the rows.
struct Case {
  const PackedMatrix& matrix;
  Floats& x;
  Codes& codes;                   // of x
  std::vector<uint16_t>& halves;  // x as bfloat16, rows as far apart as those of x
  const float* bias;

  InputRows rows(int first) {
    if (is_quantised(matrix.view.storage)) return {codes.row(first), codes.stride};
    if (matrix.view.storage == Storage::bf16) {
      return {reinterpret_cast<uint8_t*>(halves.data() + first * x.stride), x.stride * 2};
    }
    return {reinterpret_cast<uint8_t*>(x.row(first)), x.stride * 4};
  }
};

// Cuts floats to what bfloat16 holds.
std::vector<uint16_t> halve(Floats& x) {
  std::vector<uint16_t> halves(x.values.size());
  for (size_t i = 0; i < halves.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x.values[i], 4);
    bits &= 0xffff0000u;
    std::memcpy(&x.values[i], &bits, 4);
    halves[i] = uint16_t(bits >> 16);
  }
  return halves;
}

Floats multiply(const Level& level, Case c, int first, int tokens, bool both_threads) {
  const int columns = c.matrix.view.cols;
  Floats out(tokens, kRows);
  LinearLaunch launch{};
  launch.x = c.rows(first);
  launch.cols = columns;
  LinearPart part{};
  part.matrix = c.matrix.view;
  part.bias = c.bias;
  part.out.f32 = out.rows();
  launch.parts = {part};
  level.run(launch, Step(tokens), both_threads);
  return out;
}

bool is_product(const Case& c, Floats& y) {
  const int columns = c.matrix.view.cols;
  const bool quantised = is_quantised(c.matrix.view.storage);
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) {
      double sum = c.bias[r], size = std::abs(sum);
      for (int k = 0; k < columns; ++k) {
        const double x = quantised ? c.codes.value(t, k, columns) : double(c.x.row(t)[k]);
        const double product = x * double(c.matrix.values[size_t(r) * size_t(columns) + size_t(k)]);
        sum += product;
        size += std::abs(product);
      }
      if (!near(y.row(t)[r], sum, size * 3e-6)) return false;
    }
    for (int64_t r = kRows; r < y.stride; ++r) {
      if (!std::isnan(y.row(t)[r])) return false;  // padding is not written
    }
  }
  return true;
}

// A row's result does not depend on how many rows there are, or on the threads.
bool is_invariant(const Level& level, const Case& c, Floats& whole) {
  for (const int tokens : {1, 2, 3, 4, 5, 7, 8, 9, kTokens}) {
    for (int first = 0; first + tokens <= kTokens; first += tokens) {
      Floats some = multiply(level, c, first, tokens, first / tokens % 2 == 0);
      for (int t = 0; t < tokens; ++t) {
        if (!same_bits(some.row(t), whole.row(first + t), kRows)) return false;
      }
    }
  }
  return true;
}

void check_storage(const Level& level, const std::string& name, Storage storage, int columns) {
  const std::string what = name + " of " + std::to_string(columns) + " columns";
  const PackedMatrix matrix = make_matrix(level, storage, kRows, columns, 11);
  bool unpacks = true;
  std::vector<float> row(static_cast<size_t>(columns));
  for (int r = 0; r < kRows; ++r) {
    level.kernels.unpack_row(matrix.view, r, row.data());
    unpacks = unpacks && same_bits(row.data(), matrix.values.data() + size_t(r) * row.size(), row.size());
  }
  level.line(what + " packs block by block as it does at once", unpacks);
  std::printf("values %s %016llx\n", what.c_str(), static_cast<unsigned long long>(hash(matrix.values)));

  Random random(5);
  Floats x(kTokens, columns);
  for (int t = 0; t < kTokens; ++t) {
    for (int c = 0; c < columns; ++c) x.row(t)[c] = random.normal();
  }
  std::vector<uint16_t> halves;
  if (storage == Storage::bf16) halves = halve(x);
  Codes codes(kTokens, columns);
  QuantiseLaunch quantise{};
  quantise.x = x.rows();
  quantise.out.a8 = codes.rows();
  quantise.width = columns;
  level.run(quantise, Step(kTokens));
  const std::vector<float> bias = random.normals(kRows);
  const Case c{matrix, x, codes, halves, bias.data()};
  Floats whole = multiply(level, c, 0, kTokens, false);
  level.line(what + " times rows", is_product(c, whole));
  level.line(what + " for any number of rows and threads", is_invariant(level, c, whole));
}

// act(gate x + bias) * (matrix x), to A8 in the same pass.
void check_gate(const Level& level) {
  constexpr int kColumns = 96;
  const PackedMatrix matrix = make_matrix(level, Storage::f32, kRows, kColumns, 1),
                     gate = make_matrix(level, Storage::f32, kRows, kColumns, 2);
  Random random(3);
  Floats x(kTokens, kColumns), out(kTokens, kRows);
  for (float& value : x.values) value = random.normal() * 0.1f;
  Codes codes(kTokens, kRows), expected(kTokens, kRows);
  const std::vector<float> bias = random.normals(kRows);
  LinearLaunch launch{};
  launch.x = {reinterpret_cast<uint8_t*>(x.row(0)), x.stride * 4};
  launch.cols = kColumns;
  LinearPart part{};
  part.matrix = matrix.view;
  part.gate = gate.view;
  part.gate_bias = bias.data();
  part.activation = Activation::silu;
  part.out.f32 = out.rows();
  launch.parts = {part};
  level.run(launch, Step(kTokens), true);
  launch.parts[0].out = {};
  launch.parts[0].out.a8 = codes.rows();
  level.run(launch, Step(kTokens), true);
  QuantiseLaunch quantise{};
  quantise.x = out.rows();
  quantise.out.a8 = expected.rows();
  quantise.width = kRows;
  level.run(quantise, Step(kTokens));
  bool same = true, right = true;
  for (int t = 0; t < kTokens; ++t) {
    same = same && std::memcmp(codes.row(t), expected.row(t), size_t(codes.stride)) == 0;
    for (int r = 0; r < kRows; ++r) {
      double up = 0, g = bias[size_t(r)];
      for (int k = 0; k < kColumns; ++k) {
        up += double(x.row(t)[k]) * double(matrix.values[size_t(r * kColumns + k)]);
        g += double(x.row(t)[k]) * double(gate.values[size_t(r * kColumns + k)]);
      }
      right = right && near(out.row(t)[r], g / (1 + std::exp(-g)) * up, 1e-5);
    }
  }
  level.line("gated linear", right);
  level.line("gated linear to A8 as in two launches", same);
}

// Embeddings are rows of a matrix, scaled. What is denormal counts as zero there.
void check_embed(const Level& level, const std::string& name, Storage storage) {
  const PackedMatrix matrix = make_matrix(level, storage, kRows, kColumns[0], 4);
  Floats out(kTokens, kColumns[0]);
  Step step(kTokens);
  for (int t = 0; t < kTokens; ++t) step.tokens[size_t(t)] = (t * 5) % kRows;
  EmbedLaunch launch{};
  launch.matrix = matrix.view;
  launch.out = out.rows();
  launch.scale = 0.5f;
  level.run(launch, step, true);
  bool right = true;
  for (int t = 0; t < kTokens; ++t) {
    const float* row = matrix.values.data() + size_t(step.tokens[size_t(t)]) * size_t(kColumns[0]);
    for (int c = 0; c < kColumns[0]; ++c) right = right && near(out.row(t)[c], row[c] * 0.5f, 0x1p-125);
  }
  level.line(name + " embeddings", right);
}

}  // namespace

void check_linear(const Level& level) {
  for (const auto& [name, storage] : kStorages) {
    for (const int columns : kColumns) check_storage(level, name, storage, columns);
    check_embed(level, name, storage);
  }
  check_gate(level);
}

}  // namespace check
