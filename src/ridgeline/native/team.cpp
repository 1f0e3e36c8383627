#include "team.h"

#include <unistd.h>

#include <chrono>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ridgeline {
namespace {

// Longer than balanced workers wait for each other. Whoever waits longer sleeps, because the one that is
// waited for may need this very core.
constexpr int64_t kPhaseSpinNs = 20'000;
// Between two steps the caller samples and schedules.
constexpr int64_t kIdleSpinNs = 50'000;

constexpr uint32_t kOpen = 1u << 31;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

FloatState::FloatState(bool flush_denormals) {
#if defined(__x86_64__)
  saved_ = _mm_getcsr();
  _mm_setcsr(0x1f80u | (flush_denormals ? 0x8040u : 0u));
#elif defined(__aarch64__)
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(uint64_t(flush_denormals) << 24));
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
  if (owner_process_ != getpid()) {  // the threads, and whoever held the mutex, are not in this process
    for (auto& worker : workers_) worker.detach();
    workers_.clear();
    return;
  }
  std::lock_guard lock(mutex_);
  if (closed_) return;
  closed_ = true;
  task_ = nullptr;
  gate_.store(kOpen);
  job_.fetch_add(1);
  wake();
  for (auto& worker : workers_) worker.join();
}

void Team::run(int phases, void (*task)(void*, int), void* argument) {
  if (owner_process_ != getpid()) {
    throw std::runtime_error("the team's threads stayed in the parent of this fork");
  }
  std::lock_guard lock(mutex_);
  if (closed_) throw std::runtime_error("the team is closed");
  if (phases > phase_capacity_) {
    words_.reset(new Word[size_t(phases) * size_t(threads_ + 1)]);
    phase_capacity_ = phases;
  }
  ++epoch_;
  task_ = task;
  argument_ = argument;
  gate_.store(kOpen);
  job_.fetch_add(1);
  wake();
  {
    const FloatState state;
    task(argument, 0);
  }
  // Nobody may still use the task or its argument when this returns.
  gate_.fetch_and(~kOpen);
  await([this] { return gate_.load() == 0; }, kPhaseSpinNs);
}

void Team::rouse() {
  if (owner_process_ == getpid()) wake();
}

// Joins the run of the moment; false if it is over.
bool Team::enter() {
  uint32_t gate = gate_.load();
  while ((gate & kOpen) != 0) {
    if (gate_.compare_exchange_weak(gate, gate + 1)) return true;
  }
  return false;
}

void Team::work(int worker) {
  const FloatState state;
  for (uint32_t seen = 0;;) {
    await([&] { return job_.load() != seen; }, kIdleSpinNs);
    seen = job_.load();
    if (!enter()) continue;
    if (task_ == nullptr) return;
    task_(argument_, worker);
    if (gate_.fetch_sub(1) == 1) wake();
  }
}

void Team::finish_phase(int phase, int64_t done_by_me, int64_t count) {
  std::atomic<uint64_t>& word = words_[size_t(phase) * size_t(threads_ + 1) + size_t(threads_)].value;
  const uint64_t complete = uint64_t(epoch_) << 32 | uint64_t(count);
  if (done_by_me > 0) {
    uint64_t seen = word.load(std::memory_order_relaxed), next;
    do {
      next = uint64_t(epoch_) << 32 | ((seen >> 32 == epoch_ ? uint32_t(seen) : 0) + uint64_t(done_by_me));
    } while (!word.compare_exchange_weak(seen, next));
    if (next == complete) return wake();
  }
  if (count > 0) await([&] { return word.load() == complete; }, kPhaseSpinNs);
}

// What is waited for is changed before sleepers_ is read here, and checked after sleepers_ was raised there:
// all of it sequentially consistent, so that no change is slept through.
void Team::wake() {
  if (sleepers_.load() == 0) return;
  pulse_.fetch_add(1);
  pulse_.notify_all();
}

template <class Ready>
void Team::await(Ready ready, int64_t spin_ns) {
  for (bool slept = true; slept;) {
    const int64_t start = now_ns();
    do {
      for (int i = 0; i < 64; ++i) {
        if (ready()) return;
        pause();
      }
    } while (now_ns() - start < spin_ns);
    sleepers_.fetch_add(1);
    const uint32_t pulse = pulse_.load();
    slept = !ready();
    if (slept) pulse_.wait(pulse);
    sleepers_.fetch_sub(1);
  }
}

}  // namespace ridgeline
