// A persistent pool of threads for short parallel regions.
#pragma once

#include <atomic>
#include <cstdint>

namespace barefoot {

// Threads in use, the caller's included.
int n_threads();
void set_threads(int n);

// Hand tasks to the threads of an OpenMP that the process has loaded instead of threads of one's own, by its entry
// point GOMP_parallel; null for one's own. Theirs wait for work awake, on the cores that ours would need.
using Openmp = void (*)(void (*)(void*), void*, unsigned, unsigned);
void use_openmp(Openmp parallel);

// Run body(context, task, thread) for every task in [0, n_tasks); thread < min(n_threads(), max_threads). Tasks are
// handed out a few at a time where they are many, in any order, so their results must not depend on which thread runs them. One region runs at a time.
void run_tasks(int64_t n_tasks, int max_threads, void (*body)(void*, int64_t, int), void* context);

template <class Body>
void parallel_for(int64_t n_tasks, int max_threads, Body body) {
  auto call = [](void* context, int64_t task, int thread) { (*static_cast<Body*>(context))(task, thread); };
  run_tasks(n_tasks, max_threads, call, &body);
}

// The same, one task at a time and in order: one may wait for those before it.
template <class Body>
void parallel_in_order(int64_t n_tasks, int max_threads, Body body) {
  std::atomic<int64_t> next{0};
  parallel_for(max_threads, max_threads, [&](int64_t, int thread) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) body(task, thread);
  });
}

// Whose turn it is, of tasks that run at once and add to one sum in order.
class Turn {
 public:
  void wait(int32_t turn) const;
  void pass();

 private:
  std::atomic<int32_t> turn_{0};
};

}  // namespace barefoot
