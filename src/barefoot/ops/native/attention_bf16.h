// Attention of many tokens with products of bfloat16 tiles (AMX-BF16): queries times scale, keys, values and
// probabilities are rounded to bfloat16 once each; products, softmax and totals are float32.
//
// FlashAttention's schedule (Dao et al. 2022, arXiv:2205.14135, algorithm 1) on transposed matrices: scores stand as
// [keys][queries] and sums as [head_dim][queries], so that a vector holds sixteen queries and the softmax never reduces
// across lanes. Keys are then left operands as they are stored, values are transposed as they are decoded, and
// probabilities become right operands by interleaving pairs of rows.
#pragma once

constexpr int64_t kColumns = kBfloat16Queries;  // queries of a block: two tiles side by side
constexpr int64_t kFar = 1 << 30;
constexpr float kLowest = -1e38f;  // a maximum of nothing: its difference to -infinity is -infinity

struct Bfloat16Scratch {  // of one thread; widths: deep = head_dim rounded up to whole tiles of 32
  uint16_t* q;        // [blocks][deep / 2][kColumns][2]
  float* sum;         // [blocks][deep][kColumns]
  float *top, *total; // [blocks][kColumns]
  int32_t* token;     // [blocks][kColumns]: of each query, from the first of the task
  uint16_t* keys;     // [kKeyTile][deep]
  uint16_t* values;   // [deep][kKeyTile]
  float* rows;        // [kKeyTile][deep]: decoded
  float* pairs;       // [kTileSide][deep]: each two values of a pair of keys
  float* score;       // [kKeyTile][kColumns]
  uint16_t* weights;  // [kKeyTile / 2][kColumns][2]
};

inline Bfloat16Scratch bfloat16_scratch(const AttentionLayout& l, int thread) {
  const int64_t queries = round_up(l.tile_tokens * l.sharing, kColumns), deep = l.deep;
  Bfloat16Scratch s{};
  uint8_t* at = reinterpret_cast<uint8_t*>(l.base + thread * l.thread_floats);
  const auto take = [&](auto*& array, int64_t n) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
    at += n * static_cast<int64_t>(sizeof *array);
  };
  take(s.q, queries * deep);
  take(s.sum, queries * deep);
  take(s.top, queries);
  take(s.total, queries);
  take(s.token, queries);
  take(s.keys, kKeyTile * deep);
  take(s.values, kKeyTile * deep);
  take(s.rows, kKeyTile * deep);
  take(s.pairs, kTileSide * deep);
  take(s.score, kKeyTile * kColumns);
  take(s.weights, kKeyTile * kColumns);
  return s;
}

// 2^x for x <= 0, within 3e-6 of it; 0 for -infinity, NaN for NaN.
inline F exp2_falling(F x) {
  const F part{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // x - floor(x)
  F p = set1(0.0135341679f);  // least relative error on [0, 1)
  for (const float c : {0.0520114606f, 0.241442757f, 0.693003834f, 1.00000259f}) p = fma(p, part, set1(c));
  return {_mm512_scalef_ps(p.v, x.v)};  // p * 2^floor(x)
}

inline __m512i to_bfloat16(F low, F high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)); }

// The queries from token t0 on that share key head `head`, scaled and rounded; those of a last block that don't exist
// are 0.
inline void start_queries(const AttentionArgs& a, const AttentionLayout& l, const Bfloat16Scratch& s, int64_t head,
                          int64_t t0, int64_t n_queries) {
  const int64_t dim = a.kv.head_dim, queries = round_up(n_queries, kColumns);
  const F scale = set1(a.scale);
  for (int64_t i0 = 0; i0 < queries; i0 += kTileSide) {
    uint16_t* const to = s.q + i0 / kColumns * l.deep * kColumns + i0 % kColumns * 2;
    for (int64_t d = 0; d < l.deep; d += kTileDepth) {
      alignas(64) float tile[kTileSide * kTileSide];
      for (int64_t i = 0; i < kTileSide; ++i) {
        const int64_t query = i0 + i;
        const float* q = a.q + ((t0 + query / l.sharing) * a.n_heads + head * l.sharing + query % l.sharing) * dim;
        const auto part = [&](int64_t from) {
          if (query >= n_queries || from >= dim) return set1(0.0f);
          return (from + kLanes <= dim ? load(q + from) : load_first(q + from, dim - from)) * scale;
        };
        _mm512_store_si512(tile + i * kTileSide, to_bfloat16(part(d), part(d + kLanes)));
      }
      transpose_block(tile, kTileSide, reinterpret_cast<float*>(to + d * kColumns), kColumns);
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    s.top[i] = kLowest;
    s.total[i] = 0.0f;
    s.token[i] = static_cast<int32_t>((i < n_queries ? i : n_queries - 1) / l.sharing);
  }
  std::memset(s.sum, 0, queries * l.deep * sizeof(float));
}

struct ByteRow {  // q8, whole groups
  static F part(const uint8_t* row, int64_t d) {
    const uint8_t* group = row + d / kGroup * (2 + kGroup);
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group + 2 + d % kGroup));
    return F{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))} * set1(half_at(group));
  }
};
struct NibbleRow {  // q4, whole groups
  static F part(const uint8_t* row, int64_t d) {
    const uint8_t* group = row + d / kGroup * (4 + kGroup / 2);
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group + 4)));
    const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, d % kGroup ? 4 : 0), _mm512_set1_epi32(15));
    return fma({_mm512_cvtepi32_ps(code)}, set1(half_at(group)), set1(half_at(group + 2)));
  }
};

// Keys of a tile, rounded; zeros up to whole tiles.
template <class Row>
inline void take_keys(const Bfloat16Scratch& s, const TileRows& rows, int64_t deep) {
  for (int64_t j = 0; j < rows.n; ++j)
    for (int64_t d = 0; d < deep; d += kTileDepth)
      _mm512_store_si512(s.keys + j * deep + d,
                         to_bfloat16(Row::part(rows.at[j], d), Row::part(rows.at[j], d + kLanes)));
  std::memset(s.keys + rows.n * deep, 0, (round_up(rows.n, kTileDepth) - rows.n) * deep * sizeof(uint16_t));
}

// Values of a tile, transposed; those behind the last meet probabilities of 0.
template <class Row>
inline void take_values(const Bfloat16Scratch& s, const TileRows& rows, int64_t deep) {
  for (int64_t j0 = 0; j0 < rows.n; j0 += kTileDepth) {
    for (int64_t j = j0; j < j0 + kTileDepth; j += 2) {
      const uint8_t* const even = rows.at[j < rows.n ? j : rows.n];
      const uint8_t* const odd = rows.at[j + 1 < rows.n ? j + 1 : rows.n];
      float* const to = s.pairs + (j - j0) / 2 * deep;
      for (int64_t d = 0; d < deep; d += kLanes)
        _mm512_store_si512(to + d, interleave_bfloat16(Row::part(even, d), Row::part(odd, d)));
    }
    for (int64_t d = 0; d < deep; d += kTileSide)
      transpose_block(s.pairs + d, deep, reinterpret_cast<float*>(s.values + d * kKeyTile + j0), kKeyTile / 2);
  }
}

// score[j][i] = keys[j] . q[i] for keys [begin, end), whole steps of 32.
inline void score_block(const uint16_t* keys, const uint16_t* q, int64_t begin, int64_t end, int64_t deep,
                        float* score) {
  const int64_t key_bytes = 2 * deep, row_bytes = 4 * kColumns;
  for (int64_t j = begin; j < end; j += 2 * kTileSide) {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (int64_t d = 0; d < deep; d += kTileDepth) {
      load_tile<4>(keys + j * deep + d, key_bytes);
      load_tile<6>(q + d * kColumns, row_bytes);
      load_tile<7>(q + d * kColumns + kTileDepth, row_bytes);
      load_tile<5>(keys + (j + kTileSide) * deep + d, key_bytes);
      multiply_tiles<0, 4, 6>();
      multiply_tiles<1, 4, 7>();
      multiply_tiles<2, 5, 6>();
      multiply_tiles<3, 5, 7>();
    }
    store_tile<0>(score + j * kColumns, row_bytes);
    store_tile<1>(score + j * kColumns + kTileSide, row_bytes);
    store_tile<2>(score + (j + kTileSide) * kColumns, row_bytes);
    store_tile<3>(score + (j + kTileSide) * kColumns + kTileSide, row_bytes);
  }
}

// sum[d][i] += sum over keys [begin, end) of values[d][j] * weights[j][i].
inline void mix_block(const uint16_t* values, const uint16_t* weights, int64_t begin, int64_t end, int64_t deep,
                      float* sum) {
  const int64_t value_bytes = 2 * kKeyTile, row_bytes = 4 * kColumns;
  for (int64_t d = 0; d < deep; d += 2 * kTileSide) {
    float *const upper = sum + d * kColumns, *const lower = upper + kTileSide * kColumns;
    load_tile<0>(upper, row_bytes);
    load_tile<1>(upper + kTileSide, row_bytes);
    load_tile<2>(lower, row_bytes);
    load_tile<3>(lower + kTileSide, row_bytes);
    for (int64_t j = begin; j < end; j += kTileDepth) {
      load_tile<4>(values + d * kKeyTile + j, value_bytes);
      load_tile<6>(weights + j * kColumns, row_bytes);
      load_tile<7>(weights + j * kColumns + kTileDepth, row_bytes);
      load_tile<5>(values + (d + kTileSide) * kKeyTile + j, value_bytes);
      multiply_tiles<0, 4, 6>();
      multiply_tiles<1, 4, 7>();
      multiply_tiles<2, 5, 6>();
      multiply_tiles<3, 5, 7>();
    }
    store_tile<0>(upper, row_bytes);
    store_tile<1>(upper + kTileSide, row_bytes);
    store_tile<2>(lower, row_bytes);
    store_tile<3>(lower + kTileSide, row_bytes);
  }
}

// Which keys of a tile each query of a column sees: oldest <= key <= last.
struct Seen {
  __m512i oldest, last;
  __mmask16 operator()(int64_t key) const {
    const __m512i at = _mm512_set1_epi32(static_cast<int32_t>(key));
    return _mm512_cmple_epi32_mask(oldest, at) & _mm512_cmple_epi32_mask(at, last);
  }
};

// One step of the running softmax of sixteen queries over scores [begin, end), which become probabilities.
template <bool Masked>
inline void soften_column(float* score, int64_t begin, int64_t end, const Seen& seen, float softcap, int64_t deep,
                          uint16_t* weights, float* top, float* total, float* sum) {
  if (softcap > 0.0f) {
    const F cap = set1(softcap), inverse = set1(1.0f / softcap);
    for (int64_t j = begin; j < end; ++j)
      store(score + j * kColumns, cap * tanh(load(score + j * kColumns) * inverse));
  }
  const F before = load(top);
  F highest = before;
  for (int64_t j = begin; j < end; ++j) {
    F each = load(score + j * kColumns);
    if constexpr (Masked) {
      each.v = _mm512_mask_blend_ps(seen(j), _mm512_set1_ps(-INFINITY), each.v);
      store(score + j * kColumns, each);
    }
    highest = max(each, highest);
  }
  const F log2_e = set1(1.44269504f), shift = set1(0.0f) - highest * log2_e;
  F even = set1(0.0f), odd = even;
  for (int64_t j = begin; j < end; j += 2) {
    const F low = exp2_falling(fma(load(score + j * kColumns), log2_e, shift));
    const F high = exp2_falling(fma(load(score + (j + 1) * kColumns), log2_e, shift));
    even = even + low;
    odd = odd + high;
    _mm512_store_si512(weights + j * kColumns, interleave_bfloat16(low, high));
  }
  const F factor = exp2_falling((before - highest) * log2_e);
  store(total, fma(load(total), factor, even + odd));
  store(top, highest);
  if (_mm512_cmp_ps_mask(factor.v, set1(1.0f).v, _CMP_EQ_OQ) == 0xffff) return;  // no new maximum
  for (int64_t d = 0; d < deep; ++d) store(sum + d * kColumns, load(sum + d * kColumns) * factor);
}

// Queries [i0, i0 + kColumns) of a task over the tile of n keys from position `base` on.
inline void attend_block(const AttentionArgs& a, const AttentionLayout& l, const Bfloat16Scratch& s, int64_t i0,
                         int64_t t0, int64_t base, int64_t n) {
  const int64_t near = a.n_past + t0 - base;  // of the task's first token, from the tile's first key
  const int64_t youngest = near + s.token[i0 + kColumns - 1], eldest = near + s.token[i0];
  const int64_t from = a.window > 0 ? eldest - a.window + 1 : 0, to = youngest + 1 < n ? youngest + 1 : n;
  const int64_t begin = from > 0 ? from / kTileDepth * kTileDepth : 0, end = round_up(to, kTileDepth);
  if (begin >= end || to <= 0) return;
  const bool masked = eldest + 1 < end || (a.window > 0 && youngest - a.window + 1 > begin);
  score_block(s.keys, s.q + i0 * l.deep, begin, end, l.deep, s.score);
  for (int64_t c = 0; c < kColumns; c += kLanes) {
    // Only differences within the tile matter, so far positions may be cut.
    const auto cut = [](int64_t key) { return static_cast<int32_t>(key < -kFar ? -kFar : key > kFar ? kFar : key); };
    const __m512i token = _mm512_load_si512(s.token + i0 + c);
    const Seen seen{a.window > 0 ? _mm512_add_epi32(token, _mm512_set1_epi32(cut(near - a.window + 1)))
                                 : _mm512_setzero_si512(),
                    _mm512_add_epi32(token, _mm512_set1_epi32(cut(near)))};
    const auto soften = masked ? soften_column<true> : soften_column<false>;
    soften(s.score + c, begin, end, seen, a.softcap, l.deep, s.weights + 2 * c, s.top + i0 + c, s.total + i0 + c,
           s.sum + i0 * l.deep + c);
  }
  mix_block(s.values, s.weights, begin, end, l.deep, s.sum + i0 * l.deep);
}

inline void write_outputs(const AttentionArgs& a, const AttentionLayout& l, const Bfloat16Scratch& s, int64_t head,
                          int64_t t0, int64_t n_queries) {
  const int64_t dim = a.kv.head_dim;
  for (int64_t i0 = 0; i0 < n_queries; i0 += kTileSide)
    for (int64_t d = 0; d < dim; d += kTileSide) {
      float tile[kTileSide * kTileSide];
      transpose_block(s.sum + i0 / kColumns * l.deep * kColumns + d * kColumns + i0 % kColumns, kColumns, tile,
                      kTileSide);
      for (int64_t query = i0; query < n_queries && query < i0 + kTileSide; ++query) {
        float* out = a.out + ((t0 + query / l.sharing) * a.n_heads + head * l.sharing + query % l.sharing) * dim + d;
        write_output(tile + (query - i0) * kTileSide, s.total[query], dim - d < kTileSide ? dim - d : kTileSide, out);
      }
    }
}

// Any rows as rows of floats, for widths that are not whole tiles and formats without a reader of their own.
inline TileRows decode_rows(const AttentionArgs& a, const TileRows& rows, int64_t deep, float* to) {
  TileRows decoded;
  for (int64_t j = 0; j < rows.n; ++j, to += deep) {
    decode_kv_row(a.kv, rows.at[j], to, deep);
    decoded.at[j] = reinterpret_cast<const uint8_t*>(to);
  }
  decoded.at[rows.n] = decoded.at[rows.n - 1];
  decoded.n = rows.n;
  return decoded;
}

// The queries of tokens [t0, t0 + n_tokens) that share key head `head`, over positions [first, last).
template <class Row>
inline void attend_bfloat16(const AttentionArgs& a, const AttentionLayout& l, const Bfloat16Scratch& s, int64_t head,
                            int64_t t0, int64_t n_tokens, int64_t first, int64_t last) {
  const Tiles tiles;
  const int64_t n_queries = n_tokens * l.sharing;
  start_queries(a, l, s, head, t0, n_queries);
  for (int64_t base = first; base < last; base += kKeyTile) {
    const int64_t n = last - base < kKeyTile ? last - base : kKeyTile;
    TileRows keys = tile_rows(a.kv, a.k, head, base, n), values = tile_rows(a.kv, a.v, head, base, n);
    if constexpr (std::is_same_v<Row, FloatRow>) keys = decode_rows(a, keys, l.deep, s.rows);
    take_keys<Row>(s, keys, l.deep);
    if constexpr (std::is_same_v<Row, FloatRow>) values = decode_rows(a, values, l.deep, s.rows);
    take_values<Row>(s, values, l.deep);
    for (int64_t i0 = 0; i0 < n_queries; i0 += kColumns) attend_block(a, l, s, i0, t0, base, n);
  }
  write_outputs(a, l, s, head, t0, n_queries);
}

template <class Row>
inline void attend_tiles_bfloat16(const AttentionArgs& a, const AttentionLayout& l) {
  each_tile(a, l, [&](int thread, int64_t head, int64_t t0, int64_t n, int64_t first, int64_t last) {
    attend_bfloat16<Row>(a, l, bfloat16_scratch(l, thread), head, t0, n, first, last);
  });
}

inline void attend_tiles_bfloat16(const AttentionArgs& a, const AttentionLayout& l) {
  const KvFormat direct = a.kv.head_dim == l.deep ? a.kv.format : KvFormat::f32;
  if (direct == KvFormat::f16) attend_tiles_bfloat16<HalfRow>(a, l);
  else if (direct == KvFormat::q8) attend_tiles_bfloat16<ByteRow>(a, l);
  else if (direct == KvFormat::q4) attend_tiles_bfloat16<NibbleRow>(a, l);
  else attend_tiles_bfloat16<FloatRow>(a, l);
}
