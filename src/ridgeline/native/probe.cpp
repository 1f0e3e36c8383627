#include "probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

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

// Samples of `sample` until `seconds` are over, at least two.
template <class F>
std::vector<double> repeat(double seconds, F&& sample) {
  std::vector<double> samples;
  const double start = now_s();
  do {
    samples.push_back(sample());
  } while (samples.size() < 2 || now_s() - start < seconds);
  return samples;
}

// Every worker touches its own share first, so that it lies in the memory nearest to it.
void touch(Team& team, const Memory& memory, size_t piece) {
  team.run(1, [&](int index) {
    Worker{&team, index}.for_units(int64_t(memory.bytes() / piece), [&](int64_t i) {
      std::memset(memory.data() + size_t(i) * piece, 1, piece);
    });
  });
}

// A unit of work that takes a stated time: the same for all workers, so that none has to wait for another.
void work_for(double seconds) {
  const double end = now_s() + seconds;
  while (now_s() < end) {
  }
}

// Seconds of a run of `phases` phases with a unit for each worker, beside the units themselves.
double run_overhead_s(Team& team, int phases, double unit_s) {
  const double start = now_s();
  team.run(phases, [&](int index) {
    Worker worker{&team, index};
    for (int phase = 0; phase < phases; ++phase) {
      worker.for_units(team.threads(), [&](int64_t) { work_for(unit_s); });
    }
  });
  return now_s() - start - phases * unit_s;
}

}  // namespace

std::vector<std::pair<std::string, std::vector<double>>> measure_read(Team& team, size_t bytes,
                                                                      double seconds) {
  constexpr size_t kPiece = size_t(1) << 20;
  const Memory memory(round_up(bytes, kPiece));
  touch(team, memory, kPiece);
  std::vector<std::pair<std::string, std::vector<double>>> results;
  for (const Pattern& pattern : kPatterns) {
    results.emplace_back(pattern.name, repeat(seconds, [&] { return read_pass(team, memory, pattern); }));
  }
  return results;
}

std::vector<double> measure_cached_read(Team& team, const Kernels& kernels, size_t worker_bytes,
                                        double seconds) {
  constexpr double kSampleSeconds = 2e-3;
  const size_t own = round_up(worker_bytes, kReadStep);
  const Memory memory(own * size_t(team.threads()));
  touch(team, memory, own);
  auto rate = [&](int64_t passes) {
    const double start = now_s();
    team.run(1, [&](int index) {
      Worker{&team, index}.for_units(team.threads(), [&](int64_t i) {
        int32_t sum = 0;
        for (int64_t pass = 0; pass < passes; ++pass) {
          sum += kernels.read_lines(memory.data() + size_t(i) * own, own);
        }
        asm volatile("" ::"r"(sum));
      });
    });
    return double(memory.bytes()) * double(passes) / (now_s() - start);
  };
  int64_t passes = 1;
  for (int i = 0; i < 8; ++i) {  // the first are of memory that no cache holds yet
    passes = std::max<int64_t>(1, int64_t(rate(passes) * kSampleSeconds / double(memory.bytes())));
  }
  return repeat(seconds, [&] { return rate(passes); });
}

std::vector<double> measure_peak(Team& team, const Kernels& kernels, PeakFormat format, double seconds) {
  constexpr int kRuns = 6, kUnitsPerWorker = 16;
  const double run_seconds = std::max(seconds / kRuns, 1e-3);
  std::vector<double> samples;
  int64_t iterations = 1'000;
  while (samples.size() < kRuns) {
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
    if (total == 0.0) return {};
    if (elapsed < run_seconds / 2) {
      iterations = int64_t(double(iterations) * std::clamp(run_seconds / elapsed, 2.0, 100.0));
    } else {
      samples.push_back(total / elapsed);
    }
  }
  return samples;
}

std::vector<double> measure_barrier(Team& team, double seconds) {
  constexpr int kPhases = 200;
  constexpr double kUnitSeconds = 5e-6;
  return repeat(seconds, [&] { return run_overhead_s(team, kPhases, kUnitSeconds) / kPhases; });
}

std::vector<double> measure_start(Team& team, double pause_s, double seconds) {
  constexpr double kUnitSeconds = 2e-4;  // long enough that nobody does the work of one who is still waking
  return repeat(seconds, [&] {
    if (pause_s > 0) std::this_thread::sleep_for(std::chrono::duration<double>(pause_s));
    return run_overhead_s(team, 1, kUnitSeconds);
  });
}

}  // namespace ridgeline
