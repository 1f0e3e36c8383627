#include "blocks.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>

namespace ridgeline {
namespace {

static_assert(std::endian::native == std::endian::little, "sums are of little-endian words");

constexpr uint64_t kFactor = 0x9e3779b97f4a7c15;  // odd, so that multiplying loses nothing
constexpr size_t kLanes = 8, kSumLineBytes = 8 * kLanes;
// Bytes that are summed while they are still in a core's cache.
constexpr size_t kReadBytes = size_t(128) << 10;

uint64_t mixed(uint64_t sum, uint64_t word) { return std::rotl(sum ^ word, 29) * kFactor; }

// Eight sums side by side, each of every eighth word, hide the latency of multiplying.
class Sum {
 public:
  Sum() {
    for (size_t i = 0; i < kLanes; ++i) lanes_[i] = (i + 1) * kFactor;
  }
  // All calls but the last take whole lines.
  void add(const uint8_t* data, size_t bytes) {
    bytes_ += bytes;
    uint64_t words[kLanes];
    for (; bytes >= kSumLineBytes; bytes -= kSumLineBytes, data += kSumLineBytes) {
      std::memcpy(words, data, kSumLineBytes);
      for (size_t i = 0; i < kLanes; ++i) lanes_[i] = mixed(lanes_[i], words[i]);
    }
    if (bytes == 0) return;
    std::memset(words, 0, kSumLineBytes);
    std::memcpy(words, data, bytes);
    for (size_t i = 0; i < kLanes; ++i) lanes_[i] = mixed(lanes_[i], words[i]);
  }
  uint64_t value() const {
    uint64_t sum = bytes_;
    for (const uint64_t lane : lanes_) sum = mixed(sum, lane);
    return sum ^ sum >> 32;
  }

 private:
  uint64_t lanes_[kLanes];
  uint64_t bytes_ = 0;
};

bool read_whole(int descriptor, int64_t offset, uint8_t* out, size_t bytes) {
  while (bytes > 0) {
    const ssize_t got = pread(descriptor, out, bytes, off_t(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    out += got;
    offset += got;
    bytes -= size_t(got);
  }
  return true;
}

bool read_block(int descriptor, int64_t offset, uint8_t* out, size_t bytes, uint64_t expected) {
  Sum sum;
  for (size_t done = 0; done < bytes; done += kReadBytes) {
    const size_t part = std::min(kReadBytes, bytes - done);
    if (!read_whole(descriptor, offset + int64_t(done), out + done, part)) return false;
    sum.add(out + done, part);
  }
  return sum.value() == expected;
}

}  // namespace

uint64_t checksum(const uint8_t* data, size_t bytes) {
  Sum sum;
  sum.add(data, bytes);
  return sum.value();
}

void sum_blocks(const uint8_t* data, size_t bytes, uint64_t* sums, Team& team) {
  team.run(1, [&](int index) {
    Worker{&team, index}.for_units(block_count(bytes), [&](int64_t b) {
      const size_t begin = size_t(b) * kBlockBytes;
      sums[b] = checksum(data + begin, std::min(kBlockBytes, bytes - begin));
    });
  });
}

bool read_blocks(int descriptor, int64_t offset, uint8_t* out, size_t bytes, const uint64_t* sums,
                 Team& team) {
  std::atomic<bool> sound{true};
  team.run(1, [&](int index) {
    Worker{&team, index}.for_units(block_count(bytes), [&](int64_t b) {
      if (!sound.load(std::memory_order_relaxed)) return;
      const size_t begin = size_t(b) * kBlockBytes;
      const size_t size = std::min(kBlockBytes, bytes - begin);
      if (!read_block(descriptor, offset + int64_t(begin), out + begin, size, sums[b])) {
        sound.store(false, std::memory_order_relaxed);
      }
    });
  });
  return sound.load();
}

}  // namespace ridgeline
