#include "pool.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace barefoot {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  asm volatile("yield");
#endif
}

// Return when value differs from old: spin for a while, because the next region is often microseconds away, then sleep.
template <class T>
void wait_while(const std::atomic<T>& value, T old) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// Tasks that a thread takes at a time.
int64_t claimed(int64_t n_tasks, int n) { return n_tasks > 8 * n ? n_tasks / (8 * n) : 1; }

class Pool {
  static constexpr uint32_t kOpen = 1u << 31;

 public:
  void resize(int n) {
    std::lock_guard lock(busy_);
    set_workers(n - 1);
  }

  // The caller opens a region, works in it and closes it when no task is left: it waits for workers that came, never
  // for one that the system has not woken yet, so a busy machine costs no more than the help that is missing.
  void run(int64_t n_tasks, int n, int max_threads, void (*body)(void*, int64_t, int), void* context) {
    std::lock_guard lock(busy_);
    set_workers(n - 1);
    body_ = body;
    context_ = context;
    n_tasks_ = n_tasks;
    n_claimed_ = claimed(n_tasks, n);
    max_threads_ = max_threads;
    next_.store(0, std::memory_order_relaxed);
    inside_.store(kOpen, std::memory_order_release);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    take_tasks(0);
    uint32_t left = inside_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
    for (; left != 0; left = inside_.load(std::memory_order_acquire)) wait_while(inside_, left);
  }

 private:
  void take_tasks(int thread) {
    if (thread >= max_threads_) return;
    for (int64_t task; (task = next_.fetch_add(n_claimed_, std::memory_order_relaxed)) < n_tasks_;) {
      const int64_t end = task + n_claimed_ < n_tasks_ ? task + n_claimed_ : n_tasks_;
      for (; task < end; ++task) body_(context_, task, thread);
    }
  }

  // A worker that comes late may find its region closed, or the next one open: both are right.
  bool enter() {
    uint32_t inside = inside_.load(std::memory_order_relaxed);
    while (inside & kOpen)
      if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  void work(int thread, uint32_t seen) {
    for (;;) {
      wait_while(generation_, seen);
      seen = generation_.load(std::memory_order_acquire);
      if (stop_.load(std::memory_order_acquire)) return;
      if (!enter()) continue;
      take_tasks(thread);
      if (inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) inside_.notify_one();
    }
  }

  void set_workers(int n) {
    if (static_cast<int>(workers_.size()) == n) return;
    stop_.store(true, std::memory_order_release);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false, std::memory_order_release);
    const uint32_t seen = generation_.load(std::memory_order_relaxed);
    for (int i = 0; i < n; ++i) workers_.emplace_back(&Pool::work, this, i + 1, seen);
  }

  std::mutex busy_;
  std::vector<std::thread> workers_;
  std::atomic<bool> stop_{false};
  void (*body_)(void*, int64_t, int) = nullptr;
  void* context_ = nullptr;
  int64_t n_tasks_ = 0;
  int64_t n_claimed_ = 1;  // at a time: claiming one that the other threads want too costs a tenth of a microsecond
  int max_threads_ = 1;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> inside_{0};  // workers in the region, and kOpen while more may come
};

// A region whose threads are OpenMP's. It ends when all of them have.
struct Region {
  int64_t n_tasks, n_claimed;
  int max_threads;
  void (*body)(void*, int64_t, int);
  void* context;
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int> n_threads{0};

  void work() {
    const int thread = n_threads.fetch_add(1, std::memory_order_relaxed);
    if (thread >= max_threads) return;
    for (int64_t task; (task = next.fetch_add(n_claimed, std::memory_order_relaxed)) < n_tasks;) {
      const int64_t end = task + n_claimed < n_tasks ? task + n_claimed : n_tasks;
      for (; task < end; ++task) body(context, task, thread);
    }
  }
};

std::atomic<Openmp> openmp{nullptr};
std::atomic<int> wanted_threads{1};
// Never freed: its threads sleep until the process ends. A forked child has no such threads and starts a new pool.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found) return *found;
#if !defined(_WIN32)
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_release); });
  (void)registered;
#endif
  auto* fresh = new Pool;
  if (current.compare_exchange_strong(found, fresh)) return *fresh;
  delete fresh;
  return *found;
}

}  // namespace

int n_threads() { return wanted_threads.load(std::memory_order_relaxed); }

void set_threads(int n) {
  wanted_threads.store(n, std::memory_order_relaxed);
  if (Pool* existing = current.load(std::memory_order_acquire)) existing->resize(n);
}

void use_openmp(Openmp parallel) {
#if !defined(_WIN32)
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { openmp.store(nullptr, std::memory_order_relaxed); });
  (void)registered;
#endif
  openmp.store(parallel, std::memory_order_relaxed);
}

void run_tasks(int64_t n_tasks, int max_threads, void (*body)(void*, int64_t, int), void* context) {
  const int n = n_threads();
  if (n == 1 || max_threads == 1 || n_tasks <= 1) {
    for (int64_t task = 0; task < n_tasks; ++task) body(context, task, 0);
    return;
  }
  if (const Openmp parallel = openmp.load(std::memory_order_relaxed)) {
    Region region{n_tasks, claimed(n_tasks, n), max_threads, body, context};
    parallel([](void* its) { static_cast<Region*>(its)->work(); }, &region, static_cast<unsigned>(n), 0);
    return;
  }
  pool().run(n_tasks, n, max_threads, body, context);
}

void Turn::wait(int32_t turn) const {
  for (int32_t now; (now = turn_.load(std::memory_order_acquire)) != turn;) wait_while(turn_, now);
}

void Turn::pass() {
  turn_.fetch_add(1, std::memory_order_release);
  turn_.notify_all();
}

}  // namespace barefoot
