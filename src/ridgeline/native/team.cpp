#include "team.h"

#include <unistd.h>

#include <chrono>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ridgeline {
namespace {

// Longer than a barrier between balanced workers takes, shorter than a scheduler's time slice by far.
constexpr int64_t kBarrierSpinNs = 50'000;
// Between two steps the caller samples and schedules; waking a sleeper costs about as much as this.
constexpr int64_t kIdleSpinNs = 100'000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

FloatState::FloatState() {
#if defined(__x86_64__)
  saved_ = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8040);
#elif defined(__aarch64__)
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(uint64_t(1) << 24));
#endif
}

FloatState::~FloatState() {
#if defined(__x86_64__)
  _mm_setcsr(unsigned(saved_));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" ::"r"(saved_));
#endif
}

Team::Team(int threads) : threads_(threads), owner_process_(getpid()) {
  units_ = threads_;
  workers_.reserve(size_t(threads_ - 1));
  try {
    for (int worker = 1; worker < threads_; ++worker) workers_.emplace_back([this, worker] { work(worker); });
  } catch (...) {
    close();
    throw;
  }
}

Team::~Team() { close(); }

void Team::close() {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  closed_ = true;
  task_ = nullptr;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  for (auto& worker : workers_) {
    if (owner_process_ == getpid()) {
      worker.join();
    } else {
      worker.detach();
    }
  }
}

void Team::run(void (*task)(void*, int), void* argument) {
  std::lock_guard lock(mutex_);
  if (closed_) throw std::runtime_error("the team is closed");
  if (owner_process_ != getpid()) throw std::runtime_error("the team's threads stayed in the parent of this fork");
  task_ = task;
  argument_ = argument;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  const FloatState state;
  task(argument, 0);
  barrier();
}

void Team::barrier() {
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    units_.store(threads_, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  } else {
    await_change(phase_, phase, kBarrierSpinNs);
  }
}

void Team::work(int worker) {
  const FloatState state;
  for (uint32_t seen = 0;; ++seen) {
    await_change(job_, seen, kIdleSpinNs);
    if (task_ == nullptr) return;
    task_(argument_, worker);
    barrier();
  }
}

void Team::await_change(std::atomic<uint32_t>& word, uint32_t seen, int64_t spin_ns) {
  const int64_t start = now_ns();
  do {
    for (int i = 0; i < 64; ++i) {
      if (word.load(std::memory_order_acquire) != seen) return;
      pause();
    }
  } while (now_ns() - start < spin_ns);
  while (word.load(std::memory_order_acquire) == seen) word.wait(seen, std::memory_order_acquire);
}

}  // namespace ridgeline
