// Sparse matrices in compressed rows, as csr.py describes them: out (+)= x · Sᵀ.
//
// A row's entries are added one after the other, whatever the number of tokens or threads, so the result depends on
// neither. Data come from files: whatever they hold, nothing outside x and the entries is read.
#pragma once

constexpr int64_t kCsrTokens = 16;  // taken together, one below the other, where there are as many

struct CsrRows {
  const uint8_t *offsets, *entries;
  int64_t n_entries, n_cols;

  explicit CsrRows(const CsrArgs& a)
      : offsets(a.data), entries(a.data + 4 * (a.n_rows + 1)), n_entries(a.n_entries), n_cols(a.n_cols) {}
  int64_t begin(int64_t row) const {
    const int64_t at = read<uint32_t>(offsets + 4 * row);
    return at < n_entries ? at : n_entries;
  }
  int64_t column(int64_t i) const {
    const int64_t at = read<uint16_t>(entries + 4 * i);
    return at < n_cols ? at : n_cols - 1;
  }
  float value(int64_t i) const { return half_at(entries + 4 * i + 2); }
};

// Rows [first, last) with `Tokens` tokens from `token` on.
template <int Tokens>
void csr_few(const CsrArgs& a, int64_t first, int64_t last, int64_t token) {
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
inline void csr_many(const CsrArgs& a, int64_t token, int64_t n, float* turned) {
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

// Per thread kCsrTokens tokens; nothing for fewer.
inline int64_t csr_scratch(int64_t n_tokens, int64_t n_cols, int n_threads) {
  return n_tokens < kCsrTokens ? 0 : kAlign + n_threads * kCsrTokens * n_cols * 4;
}

inline void csr_matmul(const CsrArgs& a) {
  const int threads = a.n_tokens * (a.n_rows + a.n_entries) < kParallel ? 1 : a.n_threads;
  if (a.n_tokens >= kCsrTokens) {
    auto* const base = reinterpret_cast<float*>(a.scratch + (kAlign - reinterpret_cast<uintptr_t>(a.scratch) % kAlign) % kAlign);
    parallel_for((a.n_tokens + kCsrTokens - 1) / kCsrTokens, threads, [&](int64_t tile, int thread) {
      const int64_t token = tile * kCsrTokens, left = a.n_tokens - token;
      csr_many(a, token, left < kCsrTokens ? left : kCsrTokens, base + thread * kCsrTokens * a.n_cols);
    });
    return;
  }
  // The first row of a part: as many rows and entries lie before it as its share demands.
  const CsrRows s(a);
  const int64_t n_parts = 4 * threads, total = a.n_rows + a.n_entries;
  const auto first_row = [&](int64_t part) {
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
