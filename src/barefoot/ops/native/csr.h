// Sparse matrices in compressed rows, as csr.py describes them: out (+)= x · Sᵀ.
//
// A row's entries are added one after the other, whatever the number of tokens or threads, so the result depends on
// neither.
#pragma once

constexpr int64_t kCsrTokens = 16;  // taken together, one below the other, where there are as many

struct CsrRows {
  const uint8_t *offsets, *entries;

  explicit CsrRows(const PartArgs& a) : offsets(a.data), entries(a.data + 4 * (a.n_rows + 1)) {}
  static int64_t n_entries(const PartArgs& a) { return a.n_bytes / 4 - a.n_rows - 1; }
  int64_t begin(int64_t row) const { return read<uint32_t>(offsets + 4 * row); }
  int64_t column(int64_t i) const { return read<uint16_t>(entries + 4 * i); }
  uint16_t half(int64_t i) const { return read<uint16_t>(entries + 4 * i + 2); }
  float value(int64_t i) const { return half_to_float(half(i)); }
};

inline const char* csr_flaw(const PartArgs& a) {
  if (a.n_bytes % 4 || a.n_bytes < 4 * (a.n_rows + 1)) return "not a whole number of offsets and entries";
  const CsrRows s(a);
  if (s.begin(0) != 0 || s.begin(a.n_rows) != CsrRows::n_entries(a)) return "offsets don't reach from 0 to the entries' end";
  for (int64_t row = 0; row < a.n_rows; ++row)
    if (s.begin(row + 1) < s.begin(row)) return "offsets fall";
  for (int64_t row = 0; row < a.n_rows; ++row) {
    int64_t previous = -1;
    for (int64_t i = s.begin(row); i < s.begin(row + 1); ++i) {
      const int64_t column = s.column(i);
      if (column >= a.n_cols) return "a column beyond the last";
      if (column <= previous) return "columns of a row that don't rise";
      if ((s.half(i) & 0x7c00) == 0x7c00) return "NaN or infinity";
      previous = column;
    }
  }
  return nullptr;
}

// Rows [first, last) with `Tokens` tokens from `token` on.
template <int Tokens>
void csr_few(const PartArgs& a, int64_t first, int64_t last, int64_t token) {
  const CsrRows s(a);
  const float* x = a.x + token * a.n_cols;
  for (int64_t row = first; row < last; ++row) {
    float sum[Tokens] = {};
    for (int64_t i = s.begin(row); i < s.begin(row + 1); ++i) {
      const float value = s.value(i), *at = x + s.column(i);
      for (int t = 0; t < Tokens; ++t) sum[t] += value * at[t * a.n_cols];
    }
    float* to = a.out + token * a.n_rows + row;
    for (int t = 0; t < Tokens; ++t) to[t * a.n_rows] = a.add ? to[t * a.n_rows] + sum[t] : sum[t];
  }
}

// All rows with n tokens from `token` on, n at most kCsrTokens; `turned` holds [n_cols][kCsrTokens].
inline void csr_many(const PartArgs& a, int64_t token, int64_t n, float* turned) {
  const CsrRows s(a);
  for (int64_t t = 0; t < kCsrTokens; ++t)
    for (int64_t k = 0; k < a.n_cols; ++k) turned[k * kCsrTokens + t] = t < n ? a.x[(token + t) * a.n_cols + k] : 0.0f;
  constexpr int vectors = kCsrTokens / kLanes;
  for (int64_t row = 0; row < a.n_rows; ++row) {
    F sum[vectors];
    for (int v = 0; v < vectors; ++v) sum[v] = set1(0.0f);
    for (int64_t i = s.begin(row); i < s.begin(row + 1); ++i) {
      const F value = set1(s.value(i));
      const float* at = turned + s.column(i) * kCsrTokens;
      for (int v = 0; v < vectors; ++v) sum[v] = sum[v] + value * load(at + v * kLanes);
    }
    float each[kCsrTokens], *to = a.out + token * a.n_rows + row;
    for (int v = 0; v < vectors; ++v) store(each + v * kLanes, sum[v]);
    for (int64_t t = 0; t < n; ++t) to[t * a.n_rows] = a.add ? to[t * a.n_rows] + each[t] : each[t];
  }
}

// Of each thread its tokens, from kCsrTokens on.
inline int64_t csr_scratch(const PartArgs& a) {
  return a.n_tokens < kCsrTokens ? 0 : kAlign + a.n_threads * kCsrTokens * a.n_cols * 4;
}

inline void csr_matmul(const PartArgs& a) {
  const int64_t total = a.n_rows + CsrRows::n_entries(a);  // of what there is to do
  const int threads = a.n_tokens * total < kParallel ? 1 : a.n_threads;
  if (a.n_tokens >= kCsrTokens) {
    uint8_t* const base = a.scratch + (kAlign - reinterpret_cast<uintptr_t>(a.scratch) % kAlign) % kAlign;
    parallel_for((a.n_tokens + kCsrTokens - 1) / kCsrTokens, threads, [&](int64_t tile, int thread) {
      const int64_t token = tile * kCsrTokens, left = a.n_tokens - token;
      csr_many(a, token, left < kCsrTokens ? left : kCsrTokens,
               reinterpret_cast<float*>(base) + thread * kCsrTokens * a.n_cols);
    });
    return;
  }
  const CsrRows s(a);
  const int64_t n_parts = 4 * threads;
  const auto first_row = [&](int64_t part) {  // as many rows and entries lie before it as its share demands
    int64_t low = 0, high = a.n_rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if ((middle + s.begin(middle)) * n_parts < part * total) low = middle + 1;
      else high = middle;
    }
    return part == n_parts ? a.n_rows : low;
  };
  parallel_for(n_parts, threads, [&](int64_t part, int) {
    const int64_t first = first_row(part), last = first_row(part + 1);
    int64_t t = 0;
    for (; t + 4 <= a.n_tokens; t += 4) csr_few<4>(a, first, last, t);
    for (; t < a.n_tokens; ++t) csr_few<1>(a, first, last, t);
  });
}

constexpr PartKernel kCsr{"csr", &csr_flaw, &csr_scratch, &csr_matmul};
