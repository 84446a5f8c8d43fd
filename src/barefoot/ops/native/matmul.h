// out_i (+)= x · W_i^T for several weights of any formats: lays out the scratch and hands rows to the threads.
#pragma once

struct FormatKernels {
  bool dense;
  void (*dot_rows)(const uint8_t* const*, const Quantized8&, int64_t, float*);
  void (*unpack_tile)(const uint8_t* const*, int, int64_t, int64_t, const Tile&);
  void (*multiply_tile)(const Tile&, const Quantized8&, int64_t, int64_t, int64_t, float*, int64_t, int, bool);
  void (*multiply_float)(const uint8_t*, int64_t, int64_t, int64_t, const float*, int64_t, int64_t, float*, float*,
                         int64_t, bool);
  void (*dequantize)(const uint8_t*, int64_t, int64_t, float*);
};

template <class Format>
constexpr FormatKernels kernels_of() {
  FormatKernels k{is_dense<Format>, nullptr, nullptr, nullptr, &multiply_float<Format>, &dequantize<Format>};
  if constexpr (!is_dense<Format>) {
    k.dot_rows = &dot_rows<Format>;
    k.unpack_tile = &unpack_tile<Format>;
    k.multiply_tile = &multiply_tile_all<Format::group, Format::wide && !kUnsignedBytes>;
  }
  return k;
}

template <class List>
struct Tables;
template <class... Format>
struct Tables<FormatList<Format...>> {
  static constexpr FormatInfo info[] = {{Format::name, Format::elements, Format::bytes}...};
  static constexpr FormatKernels kernels[] = {kernels_of<Format>()...};
};
using All = Tables<Formats>;

constexpr int64_t kFewTokens = 3;    // up to here rows are dotted straight from their blocks
constexpr int64_t kParallel = 8192;  // elements below which waking the threads costs more than it saves

struct MatmulScratch {
  Quantized8 x;
  uint8_t* tiles;
  int64_t tile_bytes;  // per thread
  int64_t bytes;
};

inline MatmulScratch lay_out(const MatmulArgs& m) {
  const int64_t block = m.n_cols < kColumnBlock ? round_up(m.n_cols, 32) : kColumnBlock;
  const int64_t groups = (m.n_cols + kGroup - 1) / kGroup;
  uint8_t* const base = m.scratch + (kAlign - reinterpret_cast<uintptr_t>(m.scratch) % kAlign) % kAlign;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    uint8_t* region = base + at;
    at += round_up(bytes, kAlign);
    return region;
  };
  MatmulScratch s{};
  s.x.n_cols = m.n_cols;
  if (m.int8) {
    s.x.code = reinterpret_cast<int8_t*>(take(m.n_tokens * m.n_cols));
    s.x.scale = reinterpret_cast<float*>(take(m.n_tokens * groups * 4));
    s.x.sum32 = reinterpret_cast<float*>(take(m.n_tokens * groups * 4));
    s.x.sum16 = reinterpret_cast<float*>(take(m.n_tokens * groups * 8));
  }
  s.tile_bytes = m.int8 ? kRowTile * (block + block / 16 * 8) : kFloatRowTile * block * 4;
  s.tiles = take(s.tile_bytes * m.n_threads);
  s.bytes = kAlign + at;
  return s;
}

inline int64_t matmul_scratch(const MatmulArgs& m) { return lay_out(m).bytes; }

inline void multiply_rows(const MatmulArgs& m, const MatmulScratch& s, const Weight& w, int64_t begin, int64_t end,
                          uint8_t* tile_bytes) {
  const FormatKernels& k = All::kernels[w.format];
  const int64_t row_bytes = All::info[w.format].row_bytes(m.n_cols);
  if (k.dense || !m.int8) {
    for (int64_t r = begin; r < end; r += kFloatRowTile) {
      const int64_t n = end - r < kFloatRowTile ? end - r : kFloatRowTile;
      k.multiply_float(w.data, row_bytes, r, n, m.x, m.n_tokens, m.n_cols, reinterpret_cast<float*>(tile_bytes), w.out,
                       w.rows, m.add);
    }
    return;
  }
  const uint8_t* rows[kRowTile];
  const int64_t step = m.n_tokens <= kFewTokens ? kRows : kRowTile;
  for (int64_t r0 = begin; r0 < end; r0 += step) {
    const int n = static_cast<int>(end - r0 < step ? end - r0 : step);
    for (int64_t i = 0; i < step; ++i) rows[i] = w.data + (r0 + (i < n ? i : n - 1)) * row_bytes;
    if (step == kRows) {
      for (int64_t t = 0; t < m.n_tokens; ++t) {
        float result[kRows];
        k.dot_rows(rows, s.x, t, result);
        float* to = w.out + t * w.rows + r0;
        for (int i = 0; i < n; ++i) to[i] = m.add ? to[i] + result[i] : result[i];
      }
      continue;
    }
    const int64_t block = m.n_cols < kColumnBlock ? round_up(m.n_cols, 32) : kColumnBlock;
    Tile tile{tile_bytes, reinterpret_cast<float*>(tile_bytes + kRowTile * block), nullptr};
    tile.offset = tile.scale + kRowTile * (block / 16);
    for (int64_t k0 = 0; k0 < m.n_cols; k0 += kColumnBlock) {
      const int64_t columns = m.n_cols - k0 < kColumnBlock ? m.n_cols - k0 : kColumnBlock;
      k.unpack_tile(rows, static_cast<int>(step), k0, columns, tile);
      k.multiply_tile(tile, s.x, m.n_tokens, k0, columns, w.out + r0, w.rows, n, m.add || k0 > 0);
    }
  }
}

inline void matmul(const MatmulArgs& m) {
  const MatmulScratch s = lay_out(m);
  bool rounds = false;
  int64_t total_rows = 0;
  for (int i = 0; i < m.n_weights; ++i) {
    rounds = rounds || (m.int8 && !All::kernels[m.weights[i].format].dense);
    total_rows += m.weights[i].rows;
  }
  if (rounds) {
    const int threads = m.n_tokens * m.n_cols < kParallel ? 1 : m.n_threads;
    parallel_for(m.n_tokens, threads, [&](int64_t t, int) { quantize_token(m.x + t * m.n_cols, t, s.x); });
  }
  // About eight tasks a thread: enough to even out a busy machine, few enough to stream rows.
  const int64_t share = round_up(total_rows / (8 * m.n_threads) + 1, kRowTile);
  int64_t n_tasks = 0;
  for (int i = 0; i < m.n_weights; ++i) n_tasks += (m.weights[i].rows + share - 1) / share;
  parallel_for(n_tasks, m.n_threads, [&](int64_t task, int thread) {
    for (int i = 0; i < m.n_weights; ++i) {
      const Weight& w = m.weights[i];
      const int64_t here = (w.rows + share - 1) / share;
      if (task < here) {
        const int64_t begin = task * share, end = begin + share < w.rows ? begin + share : w.rows;
        multiply_rows(m, s, w, begin, end, s.tiles + thread * s.tile_bytes);
        return;
      }
      task -= here;
    }
  });
}

inline void embed(const int32_t* ids, int64_t n, int format, const uint8_t* data, int64_t cols, float scale,
                  float* out) {
  const int64_t row_bytes = All::info[format].row_bytes(cols);
  const int threads = n * cols < kParallel ? 1 : n_threads();
  parallel_for(n, threads, [&](int64_t i, int) {
    float* row = out + i * cols;
    All::kernels[format].dequantize(data + ids[i] * row_bytes, 0, cols, row);
    if (scale != 1.0f)
      for (int64_t k = 0; k < cols; ++k) row[k] *= scale;
  });
}
