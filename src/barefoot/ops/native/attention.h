// Causal attention over KV rows by tiles of keys with a running softmax, in float32.
#pragma once

struct AttentionScratch {  // of one thread
  float *q, *sum, *tile, *turned, *score, *top, *total;
};
struct AttentionLayout {
  int64_t sharing;        // query heads per key head
  int64_t tile_tokens;    // tokens of one task
  int64_t width, deep;    // head_dim rounded up to whole vectors, and to whole tiles of bfloat16
  int64_t thread_floats;  // scratch of one thread
  int64_t bytes;
  float* base;
  float* partial;  // [tokens][n_heads][kMaxSplits][width + 2]: weighted sum, maximum, total; of single tokens
};

// What one thread of attention_bf16.h holds; counted for every instruction set, so that a plan is for all of them.
inline int64_t bfloat16_bytes(int64_t n_queries, int64_t deep) {
  const int64_t each_query = 6 * deep + 12, each_key = (2 + 2 + 4 + 1) * deep + 6 * kBfloat16Queries;
  return round_up(n_queries, kBfloat16Queries) * each_query + kKeyTile * each_key;
}

inline AttentionLayout lay_out(const AttentionArgs& a) {
  AttentionLayout l{};
  l.sharing = a.n_heads / a.kv.n_kv_heads;
  const int64_t tokens = kQueryTile / l.sharing > 1 ? kQueryTile / l.sharing : 1, together = a.spots ? 1 : a.n_tokens;
  l.tile_tokens = tokens < together ? tokens : together;
  l.width = round_up(a.kv.head_dim, 16);
  l.deep = round_up(a.kv.head_dim, 32);
  const int64_t queries = l.tile_tokens * l.sharing;
  const int64_t floats = 2 * queries * l.width + 2 * kKeyTile * l.width + queries * kKeyTile + 2 * queries;
  const int64_t reduced = a.int8 && together > 1 ? bfloat16_bytes(queries, l.deep) : 0;
  l.thread_floats = round_up(4 * floats > reduced ? 4 * floats : reduced, kAlign) / 4;
  const int64_t partials = together == 1 ? a.n_tokens * a.n_heads * kMaxSplits : 0;
  const int64_t partial = round_up(4 * partials * (l.width + 2), kAlign);
  l.bytes = kAlign + 4 * a.n_threads * l.thread_floats + partial;
  l.base = reinterpret_cast<float*>(a.scratch + (kAlign - reinterpret_cast<uintptr_t>(a.scratch) % kAlign) % kAlign);
  l.partial = l.base + a.n_threads * l.thread_floats;
  return l;
}

inline int64_t attention_scratch(const AttentionArgs& a) { return lay_out(a).bytes; }

// Rows of a tile, on their way to the cache; the last one stands twice, for loops over pairs.
struct TileRows {
  const uint8_t* at[kKeyTile + 1];
  int64_t n;
};
inline TileRows tile_rows(const KvShape& kv, const uint8_t* buffer, int64_t head, int64_t base, int64_t n) {
  TileRows rows;
  const int64_t row_bytes = kv.row_bytes();
  const uint8_t* const begin = buffer + head * kv.capacity * row_bytes;
  const uint8_t* const end = begin + kv.capacity * row_bytes;
  const uint8_t* row = begin + base % kv.capacity * row_bytes;
  for (int64_t j = 0; j < n; ++j) {
    rows.at[j] = row;
    row += row_bytes;
    if (row == end) row = begin;
  }
  rows.at[n] = rows.at[n - 1];
  rows.n = n;
#if defined(__GNUC__)
  // They are wanted after the tile before them: without this, memory would rest while that one is worked on.
  for (int64_t j = 0; j < n; ++j)
    for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(rows.at[j] + b);
#endif
  return rows;
}

// A small matrix product: out[i][c] = (add ? out[i][c] : 0) + sum over j < n of weights[i][j] * rows[j][c]. It gives the
// scores (weights = queries, rows = transposed keys) and their weighted sums (weights = scores, rows = values).
struct Product {
  const float* weights;
  int64_t weights_stride;
  const float* rows;
  int64_t rows_stride;
  int64_t n;
  float* out;
  int64_t out_stride;
  bool add;
  int64_t weights_step = 1;  // from weights[i][j] to weights[i][j + 1]
};

template <int Queries, int Vectors>
inline void product_block(const Product& p, int64_t i0, int64_t c0) {
  F sum[Queries][Vectors];
  float* const out = p.out + i0 * p.out_stride + c0;
  for (int i = 0; i < Queries; ++i)
    for (int v = 0; v < Vectors; ++v) sum[i][v] = set1(0.0f);  // and not what is there: sums of sums err less
  const float *weights = p.weights + i0 * p.weights_stride, *row = p.rows + c0;
  for (int64_t j = 0; j < p.n; ++j, row += p.rows_stride, weights += p.weights_step) {
    F part[Vectors];
    for (int v = 0; v < Vectors; ++v) part[v] = load(row + v * kLanes);
    for (int i = 0; i < Queries; ++i) {
      const F weight = set1(weights[i * p.weights_stride]);
      for (int v = 0; v < Vectors; ++v) sum[i][v] = fma(weight, part[v], sum[i][v]);
    }
  }
  for (int i = 0; i < Queries; ++i)
    for (int v = 0; v < Vectors; ++v) {
      float* const to = out + i * p.out_stride + v * kLanes;
      store(to, p.add ? load(to) + sum[i][v] : sum[i][v]);
    }
}

template <int Queries>
inline void product_rows(const Product& p, int64_t i0, int64_t n_columns) {
  int64_t c = 0;
  for (; c + kMixVectors * kLanes <= n_columns; c += kMixVectors * kLanes) product_block<Queries, kMixVectors>(p, i0, c);
  for (; c < n_columns; c += kLanes) product_block<Queries, 1>(p, i0, c);
}

// n_columns: a multiple of kLanes.
inline void multiply(const Product& p, int64_t n_queries, int64_t n_columns) {
  int64_t i = 0;
  for (; i + 4 <= n_queries; i += 4) product_rows<4>(p, i, n_columns);
  switch (n_queries - i) {
    case 3: return product_rows<3>(p, i, n_columns);
    case 2: return product_rows<2>(p, i, n_columns);
    case 1: return product_rows<1>(p, i, n_columns);
  }
}

// One step of the running softmax of one query over scores [first, last) of a tile of n keys; the others, up to whole
// vectors, become 0.
inline void soften(float* score, int64_t first, int64_t last, int64_t n, float softcap, float* top, float* total,
                   float* sum, int64_t width) {
  n = round_up(n, kLanes);
  if (last <= first) {
    for (int64_t j = 0; j < n; ++j) score[j] = 0.0f;
    return;
  }
  if (softcap > 0.0f) {
    const F cap = set1(softcap), inverse = set1(1.0f / softcap);
    map(score + first, score + first, score + first, last - first, [&](F x, F) { return cap * tanh(x * inverse); });
  }
  for (int64_t j = 0; j < first; ++j) score[j] = -INFINITY;
  for (int64_t j = last; j < n; ++j) score[j] = -INFINITY;
  F tops = set1(*top), sums = set1(0.0f);
  for (int64_t j = 0; j < n; j += kLanes) tops = max(load(score + j), tops);
  const float highest = reduce_max(tops);
  const F shift = set1(highest);
  for (int64_t j = 0; j < n; j += kLanes) {
    const F weight = exp_falling(load(score + j) - shift);
    store(score + j, weight);
    sums = sums + weight;
  }
  if (highest == *top) {  // as for most tiles: what was summed stays as it is
    *total += reduce_add(sums);
    return;
  }
  float factor[kLanes];
  store(factor, exp_falling(set1(*top) - shift));
  *total = *total * factor[0] + reduce_add(sums);
  *top = highest;
  const F scale = set1(factor[0]);
  for (int64_t d = 0; d < width; d += kLanes) store(sum + d, load(sum + d) * scale);
}

// Scaled copies of the queries from token t0 on that share key head `head`, padded with zeros, and empty sums.
inline void start_queries(const AttentionArgs& a, const AttentionLayout& l, const AttentionScratch& s, int64_t head,
                          int64_t t0, int64_t n_queries) {
  const int64_t dim = a.kv.head_dim, width = l.width;
  for (int64_t i = 0; i < n_queries; ++i) {
    const float* q = a.q + ((t0 + i / l.sharing) * a.n_heads + head * l.sharing + i % l.sharing) * dim;
    for (int64_t d = 0; d < width; ++d) s.q[i * width + d] = d < dim ? q[d] * a.scale : 0.0f;
    for (int64_t d = 0; d < width; ++d) s.sum[i * width + d] = 0.0f;
    s.top[i] = -INFINITY;
    s.total[i] = 0.0f;
  }
}

// The queries of tokens [t0, t0 + n_tokens) that share key head `head`, over positions [first, last).
inline void attend(const AttentionArgs& a, const AttentionLayout& l, const AttentionScratch& s, int64_t head,
                   int64_t t0, int64_t n_tokens, int64_t first, int64_t last) {
  const int64_t dim = a.kv.head_dim, width = l.width, n_queries = n_tokens * l.sharing, row_bytes = a.kv.row_bytes();
  start_queries(a, l, s, head, t0, n_queries);
  const auto decode_tile = [&](const uint8_t* buffer, int64_t base, int64_t n) {
    int64_t slot = base % a.kv.capacity;
    for (int64_t j = 0; j < n; ++j, slot = slot + 1 < a.kv.capacity ? slot + 1 : 0)
      decode_kv_row(a.kv, buffer + (head * a.kv.capacity + slot) * row_bytes, s.tile + j * width, width);
  };
  for (int64_t base = first; base < last; base += kKeyTile) {
    const int64_t n = last - base < kKeyTile ? last - base : kKeyTile, columns = round_up(n, kLanes);
    decode_tile(a.k, base, n);
    for (int64_t j = 0; j < n; j += kLanes)
      for (int64_t d = 0; d < width; d += kLanes)
        transpose_block(s.tile + j * width + d, width, s.turned + d * kKeyTile + j, kKeyTile);
    multiply({s.q, width, s.turned, kKeyTile, dim, s.score, kKeyTile, false}, n_queries, columns);
    for (int64_t i = 0; i < n_queries; ++i) {
      const int64_t position = a.n_past + t0 + i / l.sharing;
      const int64_t oldest = a.window > 0 ? position - a.window + 1 : 0;
      const int64_t begin = oldest > base ? oldest - base : 0;
      const int64_t end = position + 1 - base < n ? position + 1 - base : n;
      soften(s.score + i * kKeyTile, begin < n ? begin : n, end, n, a.softcap, s.top + i, s.total + i,
             s.sum + i * width, width);
    }
    decode_tile(a.v, base, n);
    multiply({s.score, kKeyTile, s.tile, width, n, s.sum, width, true}, n_queries, width);
  }
}

inline AttentionScratch scratch_of(const AttentionLayout& l, int thread) {
  const int64_t queries = l.tile_tokens * l.sharing;
  AttentionScratch s{};
  s.q = l.base + thread * l.thread_floats;
  s.sum = s.q + queries * l.width;
  s.tile = s.sum + queries * l.width;
  s.turned = s.tile + kKeyTile * l.width;
  s.score = s.turned + kKeyTile * l.width;
  s.top = s.score + queries * kKeyTile;
  s.total = s.top + queries;
  return s;
}

inline void write_output(const float* sum, float total, int64_t n, float* out) {
  for (int64_t d = 0; d < n; ++d) out[d] = sum[d] / total;
}

// Many tokens: a task is a key head and a tile of tokens, the longest first.
// body(thread, head, first token, n_tokens, first position, end of the positions)
template <class Body>
inline void each_tile(const AttentionArgs& a, const AttentionLayout& l, Body body) {
  const int64_t n_tiles = (a.n_tokens + l.tile_tokens - 1) / l.tile_tokens;
  parallel_for(n_tiles * a.kv.n_kv_heads, a.n_threads, [&](int64_t task, int thread) {
    const int64_t head = task % a.kv.n_kv_heads, t0 = (n_tiles - 1 - task / a.kv.n_kv_heads) * l.tile_tokens;
    const int64_t n = a.n_tokens - t0 < l.tile_tokens ? a.n_tokens - t0 : l.tile_tokens;
    const int64_t oldest = a.n_past + t0 - a.window + 1;
    body(thread, head, t0, n, a.window > 0 && oldest > 0 ? oldest : 0, a.n_past + t0 + n);
  });
}

inline void attend_tiles(const AttentionArgs& a, const AttentionLayout& l) {
  const int64_t dim = a.kv.head_dim;
  each_tile(a, l, [&](int thread, int64_t head, int64_t t0, int64_t n, int64_t first, int64_t last) {
    const AttentionScratch s = scratch_of(l, thread);
    attend(a, l, s, head, t0, n, first, last);
    for (int64_t i = 0; i < n * l.sharing; ++i) {
      float* out = a.out + ((t0 + i / l.sharing) * a.n_heads + head * l.sharing + i % l.sharing) * dim;
      write_output(s.sum + i * l.width, s.total[i], dim, out);
    }
  });
}
