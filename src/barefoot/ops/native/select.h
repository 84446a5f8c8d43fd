// The largest of many numbers. Vectors skip whatever can't be among them; NaN precedes all numbers, lower indices go
// first among equals.
#pragma once

constexpr int64_t kPiece = 8 * kLanes;  // numbers looked at together

// The largest of a whole piece; +infinity where it holds NaN, so that it is looked at one by one.
inline float piece_bound(const float* x) {
  const F infinity = set1(INFINITY);
  F largest = load(x);
  largest = where_less(largest, infinity, largest, infinity);
  BAREFOOT_UNROLL
  for (int64_t i = kLanes; i < kPiece; i += kLanes) {
    const F next = load(x + i);
    largest = max(largest, where_less(next, infinity, next, infinity));
  }
  return reduce_max(largest);
}

inline bool precedes(float a, int64_t i, float b, int64_t j) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan || b_nan) return a_nan && (!b_nan || i < j);
  return a > b || (a == b && i < j);
}

inline int64_t argmax(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    if (x[best] != x[best]) break;
    const int64_t end = begin + kPiece < n ? begin + kPiece : n;
    const float bound = end - begin == kPiece ? piece_bound(x + begin) : INFINITY;
    if (bound <= x[best] && bound < INFINITY) continue;
    for (int64_t i = begin; i < end; ++i)
      if (precedes(x[i], i, x[best], best)) best = i;
  }
  return best;
}

// IEEE 754's total order of floats, as integers.
inline int32_t ordinal(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

// The first entry of least score among those whose position is below `end`; 0 where none is. Integers, so that compilers
// find the minimum of a run in vectors; only the run that holds it is searched.
inline int32_t lowest_before(const float* score, const int32_t* position, int64_t n, int32_t end) {
  constexpr int64_t kRun = 256;
  const auto at = [&](int64_t i) {  // no branch, which would keep the loop from becoming vectors
    const int32_t young = -static_cast<int32_t>(position[i] >= end);
    return (ordinal(score[i]) & ~young) | (INT32_MAX & young);
  };
  int32_t least = INT32_MAX;
  int64_t run = 0;
  for (int64_t first = 0; first < n; first += kRun) {
    const int64_t last = first + kRun < n ? first + kRun : n;
    int32_t own = INT32_MAX;
    for (int64_t i = first; i < last; ++i) {
      const int32_t x = at(i);
      own = x < own ? x : own;
    }
    if (own < least) {
      least = own;
      run = first;
    }
  }
  while (run + 1 < n && at(run) != least) ++run;
  return least == INT32_MAX ? 0 : static_cast<int32_t>(run);
}

// A heap of the first k in order so far, the last of them on top: children 2i + 1 and 2i + 2 precede their parent.
struct Best {
  float* value;
  int32_t* id;

  // Put (v, i) at `at`, or below as long as it precedes a child.
  void sift(int64_t at, int64_t n, float v, int32_t i) const {
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
      if (child + 1 < n && precedes(value[child], id[child], value[child + 1], id[child + 1])) ++child;
      if (!precedes(v, i, value[child], id[child])) break;
      value[at] = value[child];
      id[at] = id[child];
    }
    value[at] = v;
    id[at] = i;
  }
};

inline void top_k(const float* x, int64_t n, int64_t k, float* values, int32_t* ids) {
  const Best best{values, ids};
  for (int64_t i = 0; i < k; ++i) {
    values[i] = x[i];
    ids[i] = static_cast<int32_t>(i);
  }
  for (int64_t i = k / 2 - 1; i >= 0; --i) best.sift(i, k, values[i], ids[i]);
  for (int64_t begin = k; begin < n; begin += kPiece) {
    const int64_t end = begin + kPiece < n ? begin + kPiece : n;
    const float bound = end - begin == kPiece ? piece_bound(x + begin) : INFINITY;
    if (bound <= values[0] && bound < INFINITY) continue;
    for (int64_t i = begin; i < end; ++i)
      if (precedes(x[i], i, values[0], ids[0])) best.sift(0, k, x[i], static_cast<int32_t>(i));
  }
  for (int64_t size = k - 1; size > 0; --size) {  // the last of the rest goes behind it
    const float v = values[size];
    const int32_t i = ids[size];
    values[size] = values[0];
    ids[size] = ids[0];
    best.sift(0, size, v, i);
  }
}
