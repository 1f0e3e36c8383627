#include "probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "memory.h"

namespace ridgeline {
namespace {

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Wide loads are not needed to saturate memory; the sum keeps them from being optimised away.
uint64_t sum_line(const uint8_t* p) {
  uint64_t words[8];
  std::memcpy(words, p, sizeof words);
  return (words[0] ^ words[1]) + (words[2] ^ words[3]) + (words[4] ^ words[5]) + (words[6] ^ words[7]);
}

// Reads [begin, end) as `streams` interleaved runs, prefetching `ahead` bytes in front of each.
uint64_t read_streams(const uint8_t* begin, const uint8_t* end, int streams, size_t ahead) {
  const size_t run = size_t(end - begin) / size_t(streams) / kLineBytes * kLineBytes;
  uint64_t sum = 0;
  for (size_t i = 0; i < run; i += kLineBytes) {
    for (int s = 0; s < streams; ++s) {
      const uint8_t* p = begin + size_t(s) * run + i;
      if (ahead > 0) __builtin_prefetch(p + ahead);
      sum += sum_line(p);
    }
  }
  return sum;
}

struct Pattern {
  const char* name;
  int streams;
  size_t ahead_bytes;
};
constexpr Pattern kPatterns[] = {
    {"sequential", 1, 0}, {"sequential, prefetch 1 KiB", 1, 1024}, {"sequential, prefetch 4 KiB", 1, 4096},
    {"4 streams", 4, 0},  {"4 streams, prefetch 1 KiB", 4, 1024},  {"16 streams", 16, 0},
};

double read_pass(Team& team, const Memory& memory, const Pattern& pattern) {
  // Pieces are taken as workers get free, as the kernels do, so that a slow core does not set the pace.
  const size_t piece = size_t(1) << 20, pieces = memory.bytes() / piece;
  const double start = now_s();
  team.run(1, [&](int index) {
    uint64_t sum = 0;
    Worker{&team, index}.for_units(int64_t(pieces), [&](int64_t i) {
      const uint8_t* p = memory.data() + size_t(i) * piece;
      sum += read_streams(p, p + piece, pattern.streams, pattern.ahead_bytes);
    });
    asm volatile("" ::"r"(sum));
  });
  return double(pieces * piece) / (now_s() - start);
}

}  // namespace

std::vector<std::pair<std::string, double>> measure_read(Team& team, size_t bytes, double seconds) {
  const Memory memory(round_up(bytes, size_t(1) << 20));
  std::memset(memory.data(), 1, memory.bytes());
  std::vector<std::pair<std::string, double>> results;
  for (const Pattern& pattern : kPatterns) {
    double best = 0.0;
    const double start = now_s();
    do {
      best = std::max(best, read_pass(team, memory, pattern));
    } while (now_s() - start < seconds);
    results.emplace_back(pattern.name, best / 1e9);
  }
  return results;
}

double measure_peak(Team& team, const Kernels& kernels, PeakFormat format) {
  constexpr double kRunSeconds = 0.05;
  constexpr int kRuns = 4, kUnitsPerWorker = 16;
  double best = 0.0;
  int64_t iterations = 1'000;
  for (int run = 0; run < kRuns;) {
    std::vector<double> operations(size_t(team.threads()) * kUnitsPerWorker);
    const double start = now_s();
    team.run(1, [&](int index) {
      Worker{&team, index}.for_units(int64_t(operations.size()), [&](int64_t unit) {
        operations[size_t(unit)] = kernels.peak_ops(format, iterations);
      });
    });
    const double elapsed = now_s() - start;
    double total = 0.0;
    for (const double o : operations) total += o;
    if (total == 0.0) return 0.0;
    if (elapsed < kRunSeconds / 2) {
      iterations = int64_t(double(iterations) * std::clamp(kRunSeconds / elapsed, 2.0, 100.0));
      continue;
    }
    best = std::max(best, total / elapsed);
    ++run;
  }
  return best;
}

}  // namespace ridgeline
