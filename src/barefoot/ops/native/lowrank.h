// Thin factors beside a matrix, as lowrank.py describes them: out (+)= scale · (x · Aᵀ) · Bᵀ.
//
// Sums are taken in one order, whatever the number of tokens or threads, so the result depends on neither.
#pragma once

constexpr int64_t kThinHeader = 64, kThinFill = 16;
constexpr int64_t kThinTokens = 16;          // that meet the factors together, where there are as many
constexpr int64_t kThinParallel = 1 << 16;   // products below which waking the threads costs more than it saves
static_assert(kThinFill % kLanes == 0);

template <class Format>
F load_thin(const uint8_t* p) {
  if constexpr (std::is_same_v<Format, F32>) return load(p);
  if constexpr (std::is_same_v<Format, F16>) return load_half(p);
  float wide[kLanes];
  Format::to_float(p, kLanes, wide);
  return load(wide);
}

template <class Format>
struct Thin {
  int64_t cols, rows, rank;  // numbers of a row of A, and rows of B, filled up
  float scale;
  const uint8_t *a, *b;

  explicit Thin(const PartArgs& p) {
    cols = round_up(p.n_cols, kThinFill), rows = round_up(p.n_rows, kThinFill);
    rank = (p.n_bytes - kThinHeader) / (Format::bytes * (cols + rows));
    scale = read<float>(p.data);
    a = p.data + kThinHeader, b = a + Format::bytes * rank * cols;
  }
  const uint8_t* a_at(int64_t r, int64_t k) const { return a + Format::bytes * (r * cols + k); }
  const uint8_t* b_at(int64_t r, int64_t o) const {  // of B's panels of kThinFill rows
    return b + Format::bytes * ((o / kThinFill * rank + r) * kThinFill + o % kThinFill);
  }
};

template <class Format>
const char* thin_flaw(const PartArgs& p) {
  const int64_t of_rank = Format::bytes * (round_up(p.n_cols, kThinFill) + round_up(p.n_rows, kThinFill));
  const int64_t bytes = p.n_bytes - kThinHeader;
  if (bytes < of_rank || bytes % of_rank) return "bytes of no rank";
  const auto is_finite = [](uint32_t word) { return (word & 0x7f800000) != 0x7f800000; };
  bool finite = is_finite(read<uint32_t>(p.data));
  for (int64_t i = kThinHeader; i < p.n_bytes; i += Format::bytes) {
    if constexpr (Format::bytes == 4) finite = finite && is_finite(read<uint32_t>(p.data + i));
    else if constexpr (std::is_same_v<Format, F16>) finite = finite && (read<uint16_t>(p.data + i) & 0x7c00) != 0x7c00;
    else finite = finite && is_finite(static_cast<uint32_t>(read<uint16_t>(p.data + i)) << 16);
  }
  return finite ? nullptr : "NaN or infinity";
}

// thin[t * rank + r] = scale · x[t] · A[r] for rows [first, last) of A.
template <class Format, int Tokens>
void thin_in(const Thin<Format>& w, const float* x, int64_t n_cols, int64_t first, int64_t last, float* thin) {
  for (int64_t r0 = first; r0 < last; r0 += kRows) {
    F sum[Tokens][kRows];
    for (int t = 0; t < Tokens; ++t)
      for (int r = 0; r < kRows; ++r) sum[t][r] = set1(0.0f);
    for (int64_t k = 0; k < n_cols; k += kLanes) {
      F at[Tokens];
      for (int t = 0; t < Tokens; ++t) {
        const float* from = x + t * n_cols + k;
        at[t] = n_cols - k < kLanes ? load_first(from, n_cols - k) : load(from);
      }
      for (int r = 0; r < kRows; ++r) {
        const F weight = load_thin<Format>(w.a_at(r0 + r < last ? r0 + r : last - 1, k));
        for (int t = 0; t < Tokens; ++t) sum[t][r] = fma(weight, at[t], sum[t][r]);
      }
    }
    for (int t = 0; t < Tokens; ++t)
      for (int r = 0; r < kRows && r0 + r < last; ++r) thin[t * w.rank + r0 + r] = w.scale * reduce_add(sum[t][r]);
  }
}

// out (+)= thin · Bᵀ for `Vectors` vectors of outputs from o on.
template <class Format, int Tokens, int Vectors>
void thin_block(const Thin<Format>& w, const float* thin, const PartArgs& p, int64_t o, float* out) {
  F sum[Tokens][Vectors];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < Vectors; ++v) sum[t][v] = set1(0.0f);
  for (int64_t r = 0; r < w.rank; ++r) {
    F weight[Vectors];
    for (int v = 0; v < Vectors; ++v) weight[v] = load_thin<Format>(w.b_at(r, o + v * kLanes));
    for (int t = 0; t < Tokens; ++t) {
      const F at = set1(thin[t * w.rank + r]);
      for (int v = 0; v < Vectors; ++v) sum[t][v] = fma(weight[v], at, sum[t][v]);
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    for (int v = 0; v < Vectors; ++v) {
      float* to = out + t * p.n_rows + o + v * kLanes;
      const int64_t left = p.n_rows - o - v * kLanes;
      if (left >= kLanes) {
        store(to, p.add ? load(to) + sum[t][v] : sum[t][v]);
        continue;
      }
      float each[kLanes];
      store(each, sum[t][v]);
      for (int64_t i = 0; i < left; ++i) to[i] = p.add ? to[i] + each[i] : each[i];
    }
  }
}

// Outputs [first, last), whole vectors but for the last one.
template <class Format, int Tokens>
void thin_out(const Thin<Format>& w, const float* thin, const PartArgs& p, int64_t first, int64_t last, float* out) {
  int64_t o = first;
  for (; o + 3 * kLanes < last; o += 4 * kLanes) thin_block<Format, Tokens, 4>(w, thin, p, o, out);
  for (; o < last; o += kLanes) thin_block<Format, Tokens, 1>(w, thin, p, o, out);
}

// Calls f with tokens by fours, then one by one: f(their number as a constant, the first).
template <class Each>
void by_tokens(int64_t n, const Each& f) {
  int64_t t = 0;
  for (; t + 4 <= n; t += 4) f(Constant<4>(), t);
  for (; t < n; ++t) f(Constant<1>(), t);
}

template <class Format>
int64_t thin_scratch(const PartArgs& p) {
  return kAlign + 4 * Thin<Format>(p).rank * (p.n_tokens < kThinTokens ? p.n_tokens : p.n_threads * kThinTokens);
}

template <class Format>
void thin_matmul(const PartArgs& p) {
  const Thin<Format> w(p);
  uint8_t* const base = p.scratch + (kAlign - reinterpret_cast<uintptr_t>(p.scratch) % kAlign) % kAlign;
  float* const thin = reinterpret_cast<float*>(base);
  const int threads = p.n_tokens * w.rank * (w.cols + w.rows) < kThinParallel ? 1 : p.n_threads;
  const auto in = [&](int64_t t0, int64_t n, int64_t first, int64_t last, float* to) {
    by_tokens(n, [&](auto some, int64_t t) {
      thin_in<Format, some.value>(w, p.x + (t0 + t) * p.n_cols, p.n_cols, first, last, to + t * w.rank);
    });
  };
  const auto out = [&](int64_t t0, int64_t n, int64_t first, int64_t last, const float* from) {
    by_tokens(n, [&](auto some, int64_t t) {
      thin_out<Format, some.value>(w, from + t * w.rank, p, first, last, p.out + (t0 + t) * p.n_rows);
    });
  };
  if (p.n_tokens >= kThinTokens) {
    parallel_for((p.n_tokens + kThinTokens - 1) / kThinTokens, threads, [&](int64_t tile, int thread) {
      const int64_t t0 = tile * kThinTokens, left = p.n_tokens - t0, n = left < kThinTokens ? left : kThinTokens;
      float* const own = thin + thread * kThinTokens * w.rank;
      in(t0, n, 0, w.rank, own);
      out(t0, n, 0, p.n_rows, own);
    });
    return;
  }
  const auto share = [&](int64_t total, int64_t unit, int64_t i) {  // where the i-th of `threads` shares begins
    const int64_t at = (total + unit - 1) / unit * i / threads * unit;
    return at < total ? at : total;
  };
  parallel_for(threads, threads, [&](int64_t i, int) {
    in(0, p.n_tokens, share(w.rank, kRows, i), share(w.rank, kRows, i + 1), thin);
  });
  parallel_for(threads, threads, [&](int64_t i, int) {
    out(0, p.n_tokens, share(p.n_rows, kLanes, i), share(p.n_rows, kLanes, i + 1), thin);
  });
}

template <class Format>
constexpr PartKernel thin_kernel(const char* name) {
  return {name, &thin_flaw<Format>, &thin_scratch<Format>, &thin_matmul<Format>};
}
