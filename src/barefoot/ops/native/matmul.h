// out_i (+)= x · W_i^T for several weights of any formats: lays out the scratch and hands rows to the threads.
#pragma once

struct FormatKernels {
  bool in_float;
  int64_t group;  // weights that share a scale
  Dequantize* dequantize[3];  // by Layout
  void (*multiply_tile)(const Tile&, const Quantized8&, int64_t, int64_t, int64_t, float*, int64_t, int, bool);
  void (*dot_rows)(const uint8_t* const*, const Quantized8&, int64_t, float*);
  void (*unpack_tile)(const uint8_t* const*, int, int64_t, int64_t, const Tile&);
  int64_t chunks;  // of 32 columns in a block
  void (*dot_panels)(const uint8_t*, int64_t, int64_t, const Quantized8&, int64_t, float*, int64_t, bool);
  void (*unpack_panel)(const uint8_t*, int64_t, int, int64_t, int64_t, const Tile&);
  void (*pack_panel)(const uint8_t*, int64_t, uint8_t*);
  void (*look_up_panel)(const uint8_t*, int64_t, const LutTables&, int64_t, int64_t, float*, int64_t, bool);
  void (*unpack_lut)(const uint8_t*, int64_t, int, int64_t, int64_t, const Tile&);
  void (*pack_lut_panel)(const uint8_t*, int64_t, uint8_t*);
};

template <class Format>
constexpr FormatKernels kernels_of() {
  FormatKernels k{};
  k.in_float = in_float<Format>;
  k.dequantize[0] = &dequantize_row<Format>;
  if constexpr (!in_float<Format>) {
    k.group = Format::group;
    k.multiply_tile = &multiply_tile_all<Format::group, Format::wide && !kUnsignedBytes>;
    k.dot_rows = &dot_rows<Format>;
    k.unpack_tile = &unpack_tile<Format>;
  }
  if constexpr (has_panels<Format>) {
    k.chunks = Format::elements / 32;
    k.pack_panel = &pack_panel<Format>;
    if constexpr (Format::sub_bytes > 0) {
      k.dequantize[1] = &dequantize_super_lane<Format>;
      k.dot_panels = &dot_super_panels<SuperPanelOf<Format>>;
      k.unpack_panel = &unpack_super_panel<SuperPanelOf<Format>>;
    } else {
      k.dequantize[1] = &dequantize_lane<Format>;
      k.dot_panels = &dot_panels<PanelOf<Format>>;
      k.unpack_panel = &unpack_panel<PanelOf<Format>>;
    }
  }
  if constexpr (has_lut<Format>) {
    k.dequantize[2] = &dequantize_lut<Format>;
    k.look_up_panel = &look_up_panel<LutOf<Format>>;
    k.unpack_lut = &unpack_lut<LutOf<Format>>;
    k.pack_lut_panel = &pack_lut_panel<Format>;
  }
  return k;
}

template <class List>
struct Tables;
template <class... Format>
struct Tables<FormatList<Format...>> {
  static constexpr FormatInfo info[] = {
      {Format::name, Format::elements, Format::bytes, has_panels<Format>, has_lut<Format>}...};
  static constexpr FormatKernels kernels[] = {kernels_of<Format>()...};
};
using All = Tables<Formats>;

constexpr int64_t kFewTokens = 3;       // up to here rows are dotted straight from their blocks
constexpr int64_t kFewPanelTokens = 24;  // and panels
constexpr int64_t kParallel = 8192;     // elements below which waking the threads costs more than it saves

struct MatmulScratch {
  Quantized8 x;
  uint16_t* x16;  // in place of x, where products are taken in bfloat16
  LutTables lut;
  uint8_t* tiles;
  int64_t tile_bytes;  // per thread
  int64_t bytes;
};

inline bool has_layout(const MatmulArgs& m, Layout layout) {
  bool found = false;
  for (int i = 0; i < m.n_weights; ++i) found = found || m.weights[i].layout == layout;
  return found;
}
inline bool looks_up(const MatmulArgs& m) {
  return m.int8 && m.n_tokens <= kFewLutTokens && has_layout(m, Layout::lut);
}

inline bool takes_bfloat16(const MatmulArgs& m) { return kHasTiles && m.int8 && m.n_tokens >= kBfloat16Tokens; }

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
    s.x.minus2 = reinterpret_cast<int32_t*>(take(m.n_tokens * groups * 4));
    s.x16 = reinterpret_cast<uint16_t*>(base);
    const int64_t bytes16 = m.n_tokens < kBfloat16Tokens ? 0 : round_up(m.n_tokens, 16) * groups * kGroup * 2;
    at = at < bytes16 ? bytes16 : at;
  }
  s.tile_bytes = m.int8 ? kRowTile * (block + block / 16 * 8) : kFloatRowTile * block * 4;
  if (m.int8 && m.n_tokens >= kBfloat16Tokens) {
    const int64_t width = block < kBfloat16Columns ? block : kBfloat16Columns;
    const int64_t tokens = m.n_tokens < kBfloat16Block ? round_up(m.n_tokens, 16) : kBfloat16Block;
    const int64_t bytes16 = kRowTile * (width + width / 16 * 8 + 2 * width + 4 * tokens);
    s.tile_bytes = s.tile_bytes < bytes16 ? bytes16 : s.tile_bytes;
  }
  s.tiles = take(s.tile_bytes * m.n_threads);
  if (looks_up(m)) {
    s.lut.table = take(m.n_tokens * groups * kRuns * kTable);
    s.lut.half_scale = reinterpret_cast<float*>(take(m.n_tokens * groups * 4));
    s.lut.sum = reinterpret_cast<float*>(take(m.n_tokens * groups * 4));
  }
  s.bytes = kAlign + at;
  return s;
}

inline int64_t matmul_scratch(const MatmulArgs& m) { return lay_out(m).bytes; }

// The few-token kernel of rows [begin, end) in groups of four.
inline void multiply_few(const MatmulArgs& m, const Quantized8& x, const Weight& w, int64_t begin, int64_t end) {
  const int64_t row_bytes = All::info[w.format].row_bytes(m.n_cols);
  for (int64_t r0 = begin; r0 < end; r0 += kRows) {
    const int64_t n = end - r0 < kRows ? end - r0 : kRows;
    const uint8_t* rows[kRows];
    for (int64_t i = 0; i < kRows; ++i) rows[i] = w.data + (r0 + (i < n ? i : n - 1)) * row_bytes;
    for (int64_t t = 0; t < m.n_tokens; ++t) {
      float result[kRows];
      All::kernels[w.format].dot_rows(rows, x, t, result);
      float* to = w.out + t * w.rows + r0;
      for (int64_t i = 0; i < n; ++i) to[i] = m.add ? to[i] + result[i] : result[i];
    }
  }
}

// Rows r0 .. r0 + n - 1 and columns k0 .. k0 + columns - 1 into a tile of 32 rows; others stand in for missing ones.
inline void fill_tile(const Weight& w, int64_t n_cols, int64_t r0, int64_t n, int64_t k0, int64_t columns,
                      const Tile& tile) {
  const FormatKernels& k = All::kernels[w.format];
  const int64_t row_bytes = All::info[w.format].row_bytes(n_cols);
  if (w.layout == Layout::panels) {
    for (int64_t i = 0; i < kRowTile; i += kPanelRows)
      k.unpack_panel(w.data + (r0 + (i < n ? i : 0)) * row_bytes, k.chunks, static_cast<int>(i), k0, columns, tile);
    return;
  }
  if (w.layout == Layout::lut) {
    const int row0 = static_cast<int>(r0 % kLutRows);
    k.unpack_lut(w.data + (r0 - row0) * row_bytes, k.chunks, row0, k0, columns, tile);
    return;
  }
  const uint8_t* rows[kRowTile];
  for (int64_t i = 0; i < kRowTile; ++i) rows[i] = w.data + (r0 + (i < n ? i : n - 1)) * row_bytes;
  k.unpack_tile(rows, kRowTile, k0, columns, tile);
}

inline void multiply_many(const MatmulArgs& m, const Quantized8& x, const Weight& w, int64_t begin, int64_t end,
                          uint8_t* tile_bytes) {
  const int64_t block = m.n_cols < kColumnBlock ? round_up(m.n_cols, 32) : kColumnBlock;
  Tile tile{tile_bytes, reinterpret_cast<float*>(tile_bytes + kRowTile * block), nullptr};
  tile.offset = tile.scale + kRowTile * (block / 16);
  for (int64_t r0 = begin; r0 < end; r0 += kRowTile) {
    const int64_t n = end - r0 < kRowTile ? end - r0 : kRowTile;
    for (int64_t k0 = 0; k0 < m.n_cols; k0 += kColumnBlock) {
      const int64_t columns = m.n_cols - k0 < kColumnBlock ? m.n_cols - k0 : kColumnBlock;
      fill_tile(w, m.n_cols, r0, n, k0, columns, tile);
      All::kernels[w.format].multiply_tile(tile, x, m.n_tokens, k0, columns, w.out + r0, w.rows, static_cast<int>(n),
                                           m.add || k0 > 0);
    }
  }
}

inline void multiply_rows(const MatmulArgs& m, const MatmulScratch& s, const Weight& w, int64_t begin, int64_t end,
                          uint8_t* tile) {
  const FormatKernels& k = All::kernels[w.format];
  if (k.in_float || !m.int8) {
    Dequantize* const dequantize = k.dequantize[static_cast<int>(w.layout)];
    for (int64_t r = begin; r < end; r += kFloatRowTile) {
      const int64_t n = end - r < kFloatRowTile ? end - r : kFloatRowTile;
      multiply_float(dequantize, w.data, r, n, m.x, m.n_tokens, m.n_cols, reinterpret_cast<float*>(tile), w.out, w.rows, m.add);
    }
  } else if (takes_bfloat16(m)) {
    multiply_in_tiles(m, s.x16, All::info[w.format].block_elements, k.group, w.out, w.rows, begin, end, tile,
                      [&](int64_t r0, int64_t n, int64_t k0, int64_t columns, const Tile& to) {
                        fill_tile(w, m.n_cols, r0, n, k0, columns, to);
                      });
  } else if (w.layout == Layout::panels && m.n_tokens <= kFewPanelTokens) {
    const uint8_t* panels = w.data + begin * All::info[w.format].row_bytes(m.n_cols);
    k.dot_panels(panels, (end - begin) / kPanelRows, k.chunks, s.x, m.n_tokens, w.out + begin, w.rows, m.add);
  } else if (w.layout == Layout::lut && m.n_tokens <= kFewLutTokens) {
    const int64_t row_bytes = All::info[w.format].row_bytes(m.n_cols);
    for (int64_t r = begin; r < end; r += kLutRows)
      k.look_up_panel(w.data + r * row_bytes, k.chunks, s.lut, m.n_tokens, m.n_cols, w.out + r, w.rows, m.add);
  } else if (w.layout == Layout::rows && m.n_tokens <= kFewTokens) {
    multiply_few(m, s.x, w, begin, end);
  } else {
    multiply_many(m, s.x, w, begin, end, tile);
  }
}

inline void matmul(const MatmulArgs& m) {
  const MatmulScratch s = lay_out(m);
  bool rounds = false;
  for (int i = 0; i < m.n_weights; ++i) {
    const bool looked_up = m.weights[i].layout == Layout::lut && looks_up(m);
    rounds = rounds || (m.int8 && !looked_up && !All::kernels[m.weights[i].format].in_float);
  }
  if (rounds) {
    const int threads = m.n_tokens * m.n_cols < kParallel ? 1 : m.n_threads;
    parallel_for(m.n_tokens, threads, [&](int64_t t, int) {
      const float* x = m.x + t * m.n_cols;
      if (takes_bfloat16(m)) round_token(x, t, m.n_tokens, m.n_cols, s.x16);
      else quantize_token(x, t, s.x);
    });
  }
  if (looks_up(m)) {
    // The tables of one input serve all weights of this call. Pieces of 1,024 columns.
    const int64_t groups = m.n_cols / kGroup, pieces = (groups + 31) / 32;
    const int threads = m.n_tokens * m.n_cols < kParallel ? 1 : m.n_threads;
    parallel_for(m.n_tokens * pieces, threads, [&](int64_t task, int) {
      const int64_t t = task / pieces, first = task % pieces * 32, last = first + 32 < groups ? first + 32 : groups;
      for (int64_t g = t * groups + first; g < t * groups + last; ++g)
        build_tables(m.x + g * kGroup, s.lut.table + g * kRuns * kTable, s.lut.half_scale + g, s.lut.sum + g);
    });
  }
  // All rows stand in one line, in units. A task takes its share of half of what is left: the first ones stream many
  // rows, the last ones are a unit and even out what the machine did to the others.
  const int64_t unit = has_layout(m, Layout::lut) ? kLutRows : kRowTile;
  int64_t n_units = 0;
  for (int i = 0; i < m.n_weights; ++i) n_units += (m.weights[i].rows + unit - 1) / unit;
  const auto after = [&](int64_t begin) {
    const int64_t share = (n_units - begin) / (2 * m.n_threads);
    return begin + (share > 1 ? share : 1);
  };
  int64_t n_tasks = 0;
  for (int64_t at = 0; at < n_units; at = after(at)) ++n_tasks;
  parallel_for(n_tasks, m.n_threads, [&](int64_t task, int thread) {
    int64_t begin = 0;
    for (int64_t i = 0; i < task; ++i) begin = after(begin);
    const int64_t end = after(begin);
    int64_t first = 0;  // unit of the weight
    for (int i = 0; i < m.n_weights; ++i) {
      const Weight& w = m.weights[i];
      const int64_t next = first + (w.rows + unit - 1) / unit;
      const int64_t from = begin > first ? begin : first, to = end < next ? end : next;
      const int64_t last_row = (to - first) * unit;
      if (from < to)
        multiply_rows(m, s, w, (from - first) * unit, last_row < w.rows ? last_row : w.rows,
                      s.tiles + thread * s.tile_bytes);
      first = next;
    }
  });
}

inline void embed(const int32_t* ids, int64_t n, const Weight& weight, int64_t cols, float scale, float* out) {
  Dequantize* const dequantize = All::kernels[weight.format].dequantize[static_cast<int>(weight.layout)];
  const int threads = n * cols < kParallel ? 1 : n_threads();
  parallel_for(n, threads, [&](int64_t i, int) {
    float* row = out + i * cols;
    dequantize(weight.data, cols, ids[i], 0, cols, row);
    if (scale != 1.0f)
      for (int64_t k = 0; k < cols; ++k) row[k] *= scale;
  });
}

inline void pack_panels(int format, const uint8_t* rows, int64_t n_rows, int64_t n_cols, uint8_t* out) {
  const int64_t panel_bytes = kPanelRows * All::info[format].row_bytes(n_cols);
  parallel_for(n_rows / kPanelRows, n_rows * n_cols < kParallel ? 1 : n_threads(), [&](int64_t panel, int) {
    All::kernels[format].pack_panel(rows + panel * panel_bytes, n_cols, out + panel * panel_bytes);
  });
}

inline void pack_lut(int format, const uint8_t* rows, int64_t n_rows, int64_t n_cols, uint8_t* out) {
  const int64_t panel_bytes = kLutRows * All::info[format].row_bytes(n_cols);
  parallel_for(n_rows / kLutRows, n_rows * n_cols < kParallel ? 1 : n_threads(), [&](int64_t panel, int) {
    All::kernels[format].pack_lut_panel(rows + panel * panel_bytes, n_cols, out + panel * panel_bytes);
  });
}
