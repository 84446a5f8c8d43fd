// Products of stacked blocks of signs and low rank; signs.py describes the layout bit by bit and the arithmetic.
//
// Lane r of a vector belongs to row r of a panel, so nothing is summed across lanes. A few tokens meet the sign bits
// themselves: the products of an input with the columns' factors are rounded to int8, and their signed sums of all ranks
// share one look at the bits. More tokens meet a tile of weights, decoded once for all of them.
#pragma once

constexpr int64_t kFewSignTokens = 6;
constexpr int64_t kSignColumns = 256;  // of a decoded tile

#if defined(__AVX512BW__) || defined(__aarch64__)
constexpr int kSignSums = 12, kMostRanks = 6;  // sums in registers, as integers and as floats, of so many ranks
#else
constexpr int kSignSums = 4, kMostRanks = 4;
#endif

struct SignBlock {
  const uint8_t* u;     // f16 [panels][rank][16]
  const uint8_t* v;     // f16 [rank][n_cols]
  const uint8_t* bits;  // [panels][quads of columns], 8 bytes each
};

inline int64_t sign_panels(const SignArgs& s) { return (s.n_rows + kPanelRows - 1) / kPanelRows; }
inline int64_t sign_quads(const SignArgs& s) { return (s.n_cols + 3) / 4; }
inline int64_t sign_groups(const SignArgs& s) { return (s.n_cols + kSignGroup - 1) / kSignGroup; }
inline int64_t sign_bytes(const SignArgs& s) {
  return 2 * s.rank * (sign_panels(s) * kPanelRows + s.n_cols) + 8 * sign_panels(s) * sign_quads(s);
}

inline SignBlock sign_block(const SignArgs& s, int64_t index) {
  const uint8_t* const u = s.blocks[index];
  const uint8_t* const v = u + 2 * s.rank * sign_panels(s) * kPanelRows;
  return {u, v, v + 2 * s.rank * s.n_cols};
}

// --- a few tokens, one by one ---

struct SignInput {  // of one token; for each block and rank:
  int8_t* code;     // [groups * kSignGroup]
  float* scale;     // [groups]
  int32_t* sum;     // [groups], of the codes
};

// The products of one input with one rank's factors, rounded: a scale for each group, NaN if it can't be had.
inline void round_products(const float* x, const uint8_t* v, int64_t n_cols, int8_t* code, float* scale, int32_t* sum) {
  for (int64_t k0 = 0; k0 < n_cols; k0 += kSignGroup, code += kSignGroup, ++scale, ++sum) {
    const int64_t n = n_cols - k0 < kSignGroup ? n_cols - k0 : kSignGroup;
    alignas(64) float z[kSignGroup] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(z + i, load_half(v + 2 * (k0 + i)) * load(x + k0 + i));
    for (; i < n; ++i) {
      uint16_t half;
      std::memcpy(&half, v + 2 * (k0 + i), 2);
      z[i] = half_to_float(half) * x[k0 + i];
    }
    int32_t largest_bits = 0;  // magnitudes of floats order as their bits do, with infinity and NaN on top
    for (int j = 0; j < kSignGroup; ++j) {
      int32_t magnitude;
      std::memcpy(&magnitude, z + j, 4);
      magnitude &= 0x7fffffff;
      largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
    }
    float largest;
    std::memcpy(&largest, &largest_bits, 4);
    const bool finite = largest_bits < 0x7f800000, used = finite && largest >= kSmallest;
    const float inverse = used ? 127.0f / largest : 0.0f;
    int32_t total = 0;
    for (int j = 0; j < kSignGroup; ++j) {
      const float shifted = (used ? z[j] : 0.0f) * inverse + 12582912.0f;  // as in quantize_token
      int32_t rounded;
      std::memcpy(&rounded, &shifted, 4);
      rounded -= 0x4b400000;
      code[j] = static_cast<int8_t>(rounded);
      total += rounded;
    }
    *scale = finite ? (used ? largest / 127.0f : 0.0f) : NAN;
    *sum = total;
  }
}

inline SignInput lay_out_signs(const SignArgs& s, int64_t* n_bytes) {
  uint8_t* const base = s.scratch + (kAlign - reinterpret_cast<uintptr_t>(s.scratch) % kAlign) % kAlign;
  const int64_t groups = s.n_blocks * s.rank * sign_groups(s), numbers = round_up(4 * groups, kAlign);
  *n_bytes = kAlign + groups * kSignGroup + 2 * numbers;
  uint8_t* const scale = base + groups * kSignGroup;
  return {reinterpret_cast<int8_t*>(base), reinterpret_cast<float*>(scale),
          reinterpret_cast<int32_t*>(scale + numbers)};
}

// result[i] += the part of `Ranks` ranks, from `rank` on, in rows row + i * kLanes, …
template <int Ranks, int Vectors>
void add_signed(const SignArgs& s, const SignInput& x, int64_t block, int64_t rank, int64_t row, F* result) {
  const SignBlock b = sign_block(s, block);
  const int64_t quads = sign_quads(s), groups = sign_groups(s), first = block * s.rank + rank;
  const uint8_t* bits[Vectors];
  for (int i = 0; i < Vectors; ++i) {
    const int64_t r = row + i * kLanes;
    bits[i] = b.bits + 8 * (r / kPanelRows) * quads + r % kPanelRows / 2;
  }
  const int8_t* const codes = x.code + first * groups * kSignGroup;
  F total[Ranks][Vectors];
  BAREFOOT_UNROLL
  for (int j = 0; j < Ranks; ++j) {
    BAREFOOT_UNROLL
    for (int i = 0; i < Vectors; ++i) total[j][i] = set1(0.0f);
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t q0 = g * (kSignGroup / 4), q1 = q0 + kSignGroup / 4 < quads ? q0 + kSignGroup / 4 : quads;
    I dot[Ranks][Vectors];
    BAREFOOT_UNROLL
    for (int j = 0; j < Ranks; ++j) {
      BAREFOOT_UNROLL
      for (int i = 0; i < Vectors; ++i) dot[j][i] = zero_int();
    }
    for (int64_t q = q0; q < q1; ++q) {
      Quads negative[Vectors];
      BAREFOOT_UNROLL
      for (int i = 0; i < Vectors; ++i) negative[i] = spread_bits(bits[i] + 8 * q);
      BAREFOOT_UNROLL
      for (int j = 0; j < Ranks; ++j) {
        const Quads code = repeat_quad(codes + j * groups * kSignGroup + 4 * q);
        BAREFOOT_UNROLL
        for (int i = 0; i < Vectors; ++i) dot[j][i] = dot_quads<false>(dot[j][i], negative[i], code);
      }
    }
    BAREFOOT_UNROLL
    for (int j = 0; j < Ranks; ++j) {
      const int64_t at = (first + j) * groups + g;
      const F scale = set1(x.scale[at]);
      const I all = set_int(x.sum[at]);
      BAREFOOT_UNROLL
      for (int i = 0; i < Vectors; ++i) total[j][i] = fma(to_float(all - shift_left<1>(dot[j][i])), scale, total[j][i]);
    }
  }
  BAREFOOT_UNROLL
  for (int j = 0; j < Ranks; ++j) {
    for (int i = 0; i < Vectors; ++i) {
      const int64_t r = row + i * kLanes;
      const F u = load_half(b.u + 2 * ((r / kPanelRows * s.rank + rank + j) * kPanelRows + r % kPanelRows));
      result[i] = fma(u, total[j][i], result[i]);
    }
  }
}

constexpr int kSignVectors = 4;  // of rows that a task takes at a time

template <int Ranks>
void add_ranks(const SignArgs& s, const SignInput& x, int64_t block, int64_t rank, int64_t row, int64_t n_vectors,
               F* result) {
  constexpr int together = 4 * Ranks <= kSignSums ? 4 : 2 * Ranks <= kSignSums ? 2 : 1;
  int64_t i = 0;
  for (; i + together <= n_vectors; i += together)
    add_signed<Ranks, together>(s, x, block, rank, row + i * kLanes, result + i);
  for (; i < n_vectors; ++i) add_signed<Ranks, 1>(s, x, block, rank, row + i * kLanes, result + i);
}

// One token's outputs of rows [row, row + n).
inline void multiply_signs(const SignArgs& s, const SignInput& x, int64_t row, int64_t n, float* out) {
  static constexpr decltype(&add_ranks<1>) add[] = {
      &add_ranks<1>, &add_ranks<2>, &add_ranks<3>, &add_ranks<4>,
#if defined(__AVX512BW__) || defined(__aarch64__)
      &add_ranks<5>, &add_ranks<6>,
#endif
  };
  const int64_t n_vectors = (n + kLanes - 1) / kLanes, pieces = (s.rank + kMostRanks - 1) / kMostRanks;
  F result[kSignVectors];
  for (F& each : result) each = set1(0.0f);
  for (int64_t b = 0; b < s.n_blocks; ++b) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t rank = s.rank * piece / pieces, ranks = s.rank * (piece + 1) / pieces - rank;
      add[ranks - 1](s, x, b, rank, row, n_vectors, result);
    }
  }
  float sums[kSignVectors * kLanes];
  for (int i = 0; i < kSignVectors; ++i) store(sums + i * kLanes, result[i]);
  for (int64_t r = 0; r < n; ++r) out[row + r] = s.add ? out[row + r] + sums[r] : sums[r];
}

inline void multiply_few_signs(const SignArgs& s) {
  int64_t n_bytes;
  const SignInput input = lay_out_signs(s, &n_bytes);
  const int64_t groups = sign_groups(s), n_ranks = s.n_blocks * s.rank;
  constexpr int64_t unit = kSignVectors * kLanes;
  for (int64_t t = 0; t < s.n_tokens; ++t) {
    parallel_for(n_ranks, n_ranks * s.n_cols < kParallel ? 1 : s.n_threads, [&](int64_t i, int) {
      const uint8_t* v = sign_block(s, i / s.rank).v + 2 * (i % s.rank) * s.n_cols;
      round_products(s.x + t * s.n_cols, v, s.n_cols, input.code + i * groups * kSignGroup, input.scale + i * groups,
                     input.sum + i * groups);
    });
    parallel_for((s.n_rows + unit - 1) / unit, s.n_threads, [&](int64_t task, int) {
      const int64_t row = task * unit, n = s.n_rows - row < unit ? s.n_rows - row : unit;
      multiply_signs(s, input, row, n, s.out + t * s.n_rows);
    });
  }
}

// --- many tokens ---

struct SignTile {  // of a thread
  float* weights;  // [columns][32 rows], the sum of the blocks
  float* u;        // [rank][32 rows] of one of them
  float* v;        // [rank][kSignColumns]
  uint16_t* woven;
  float* sums;     // [tokens][32 rows]
};

inline SignTile sign_tile(const SignArgs& s, uint8_t* scratch, int64_t* n_bytes) {
  float* const weights = reinterpret_cast<float*>(scratch);
  float* const u = weights + kSignColumns * kRowTile;
  float* const v = u + s.rank * kRowTile;
  float* const sums = v + s.rank * kSignColumns;
  const bool rounds = s.int8 && s.n_tokens >= kBfloat16Tokens;
  const int64_t tokens = !rounds ? 0 : s.n_tokens < kBfloat16Block ? round_up(s.n_tokens, 16) : kBfloat16Block;
  uint16_t* const woven = reinterpret_cast<uint16_t*>(sums + tokens * kRowTile);
  *n_bytes = 4 * (kRowTile * (kSignColumns + s.rank + tokens) + s.rank * kSignColumns) +
             (rounds ? 2 * kRowTile * kSignColumns : 0);
  return {weights, u, v, woven, sums};
}

// A quad of columns of two vectors of rows, added to the tile or put there.
template <bool First>
void decode_quad(const SignTile& to, int64_t rank, int64_t column, int64_t row, const Quads* negative) {
  F value[2][4];
  BAREFOOT_UNROLL
  for (int i = 0; i < 8; ++i) value[i / 4][i % 4] = set1(0.0f);
  for (int64_t j = 0; j < rank; ++j) {
    const float* const u = to.u + j * kRowTile + row;
    const float* const v = to.v + j * kSignColumns + column;
    const F low = load(u), high = load(u + kLanes);
    BAREFOOT_UNROLL
    for (int c = 0; c < 4; ++c) {
      const F factor = set1(v[c]);
      value[0][c] = fma(low, factor, value[0][c]);
      value[1][c] = fma(high, factor, value[1][c]);
    }
  }
  float* const at = to.weights + column * kRowTile + row;
  BAREFOOT_UNROLL
  for (int i = 0; i < 2; ++i) {
    const F sign[4] = {negate_where<0>(negative[i], value[i][0]), negate_where<1>(negative[i], value[i][1]),
                       negate_where<2>(negative[i], value[i][2]), negate_where<3>(negative[i], value[i][3])};
    BAREFOOT_UNROLL
    for (int c = 0; c < 4; ++c) {
      float* const here = at + c * kRowTile + i * kLanes;
      store(here, First ? sign[c] : load(here) + sign[c]);
    }
  }
}

// Rows row0 .. row0 + 31 and n columns from k0 on, the sum of all blocks; rows beyond the last become zero.
inline void decode_tile(const SignArgs& s, int64_t row0, int64_t k0, int64_t n, const SignTile& to) {
  const int64_t quads = sign_quads(s), panels = sign_panels(s), last = (n + 3) / 4;
  for (int64_t block = 0; block < s.n_blocks; ++block) {
    const SignBlock b = sign_block(s, block);
    for (int64_t j = 0; j < s.rank; ++j) {
      for (int64_t r = 0; r < kRowTile; r += kLanes) {
        const int64_t panel = (row0 + r) / kPanelRows;
        const uint8_t* u = b.u + 2 * ((panel * s.rank + j) * kPanelRows + r % kPanelRows);
        store(to.u + j * kRowTile + r, panel < panels ? load_half(u) : set1(0.0f));
      }
      const uint8_t* const v = b.v + 2 * (j * s.n_cols + k0);
      float* const to_v = to.v + j * kSignColumns;
      int64_t k = 0;
      for (; k + kLanes <= n; k += kLanes) store(to_v + k, load_half(v + 2 * k));
      for (; k < 4 * last; ++k) {
        uint16_t half = 0;
        if (k < n) std::memcpy(&half, v + 2 * k, 2);
        to_v[k] = half_to_float(half);
      }
    }
    for (int64_t row = 0; row < kRowTile; row += 2 * kLanes) {
      const uint8_t* bits[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t r = row0 + row + i * kLanes;
        const int64_t panel = r / kPanelRows < panels ? r / kPanelRows : 0;  // any bits do for zeros
        bits[i] = b.bits + 8 * (panel * quads + k0 / 4) + r % kPanelRows / 2;
      }
      for (int64_t q = 0; q < last; ++q) {
        const Quads negative[2] = {spread_bits(bits[0] + 8 * q), spread_bits(bits[1] + 8 * q)};
        if (block == 0) decode_quad<true>(to, s.rank, 4 * q, row, negative);
        else decode_quad<false>(to, s.rank, 4 * q, row, negative);
      }
    }
  }
}

// sum[t][i] = the tile's rows i * kLanes, … times `Tokens` tokens over n columns.
template <int Tokens>
void multiply_columns(const float* tile, int64_t n, const float* x, int64_t stride, F (*sum)[kTileVectors]) {
  BAREFOOT_UNROLL
  for (int t = 0; t < Tokens; ++t) {
    BAREFOOT_UNROLL
    for (int i = 0; i < kTileVectors; ++i) sum[t][i] = set1(0.0f);
  }
  for (int64_t k = 0; k < n; ++k, tile += kRowTile) {
    F w[kTileVectors];
    BAREFOOT_UNROLL
    for (int i = 0; i < kTileVectors; ++i) w[i] = load(tile + i * kLanes);
    BAREFOOT_UNROLL
    for (int t = 0; t < Tokens; ++t) {
      const F factor = set1(x[t * stride + k]);
      BAREFOOT_UNROLL
      for (int i = 0; i < kTileVectors; ++i) sum[t][i] = fma(w[i], factor, sum[t][i]);
    }
  }
}

inline void multiply_sign_tile(const SignArgs& s, const SignTile& tile, int64_t row0, int64_t k0, int64_t n) {
  const int64_t n_rows = s.n_rows - row0 < kRowTile ? s.n_rows - row0 : kRowTile;
  int64_t token = 0;
  const auto take = [&](auto tokens) {
    for (; token + tokens.value <= s.n_tokens; token += tokens.value) {
      for (int64_t row = 0; row < n_rows; row += kTileVectors * kLanes) {
        F sum[tokens.value][kTileVectors];
        multiply_columns<tokens.value>(tile.weights + row, n, s.x + token * s.n_cols + k0, s.n_cols, sum);
        for (int t = 0; t < tokens.value; ++t) {
          float each[kTileVectors * kLanes], *to = s.out + (token + t) * s.n_rows + row0 + row;
          for (int i = 0; i < kTileVectors; ++i) store(each + i * kLanes, sum[t][i]);
          for (int64_t r = 0; r < kTileVectors * kLanes && row + r < n_rows; ++r)
            to[r] = s.add || k0 > 0 ? to[r] + each[r] : each[r];
        }
      }
    }
  };
  take(Constant<kTileTokens>{});
  take(Constant<1>{});
}

inline bool signs_take_bfloat16(const SignArgs& s) {
  return kHasTiles && s.int8 && s.n_tokens >= kBfloat16Tokens && s.n_cols % kGroup == 0;
}

#if defined(BAREFOOT_AMX)
inline void weave_signs(const SignTile& tile, int64_t n, uint16_t* to) {
  for (int64_t k = 0; k < n; k += kTileDepth) {
    for (int64_t row = 0; row < kRowTile; row += kTileSide) {
      for (int64_t c = k; c < k + kTileDepth; c += 2, to += 2 * kTileSide) {
        const float* const at = tile.weights + c * kRowTile + row;
        _mm512_storeu_si512(to, interleave_bfloat16(load(at), load(at + kRowTile)));
      }
    }
  }
}
#else
inline void weave_signs(const SignTile&, int64_t, uint16_t*) {}
#endif

inline void multiply_many_signs(const SignArgs& s) {
  uint8_t* const base = s.scratch + (kAlign - reinterpret_cast<uintptr_t>(s.scratch) % kAlign) % kAlign;
  int64_t tile_bytes;
  sign_tile(s, base, &tile_bytes);
  uint16_t* const x16 = reinterpret_cast<uint16_t*>(base + s.n_threads * tile_bytes);
  const bool rounds = signs_take_bfloat16(s);
  if (rounds) {
    parallel_for(s.n_tokens, s.n_tokens * s.n_cols < kParallel ? 1 : s.n_threads,
                 [&](int64_t t, int) { round_token(s.x + t * s.n_cols, t, s.n_tokens, s.n_cols, x16); });
  }
  parallel_for((s.n_rows + kRowTile - 1) / kRowTile, s.n_threads, [&](int64_t task, int thread) {
    const int64_t row0 = task * kRowTile, n_rows = s.n_rows - row0 < kRowTile ? s.n_rows - row0 : kRowTile;
    int64_t bytes;
    const SignTile tile = sign_tile(s, base + thread * tile_bytes, &bytes);
    if (rounds) {
      multiply_woven(x16, s.n_tokens, s.n_cols, s.out, s.n_rows, row0, row0 + n_rows, s.add, kSignColumns, tile.woven,
                     tile.sums, [&](int64_t r0, int64_t, int64_t k0, int64_t n) {
                       decode_tile(s, r0, k0, n, tile);
                       weave_signs(tile, n, tile.woven);
                     });
      return;
    }
    for (int64_t k0 = 0; k0 < s.n_cols; k0 += kSignColumns) {
      const int64_t n = s.n_cols - k0 < kSignColumns ? s.n_cols - k0 : kSignColumns;
      decode_tile(s, row0, k0, n, tile);
      multiply_sign_tile(s, tile, row0, k0, n);
    }
  });
}

inline bool are_few(const SignArgs& s) { return s.int8 && s.n_tokens <= kFewSignTokens; }

inline int64_t sign_scratch(const SignArgs& s) {
  int64_t n_bytes;
  if (are_few(s)) {
    lay_out_signs(s, &n_bytes);
    return n_bytes;
  }
  sign_tile(s, s.scratch, &n_bytes);
  const bool rounds = s.int8 && s.n_tokens >= kBfloat16Tokens;
  return kAlign + s.n_threads * n_bytes + (rounds ? 2 * round_up(s.n_tokens, 16) * round_up(s.n_cols, kGroup) : 0);
}

inline void sign_matmul(const SignArgs& s) {
  if (are_few(s)) multiply_few_signs(s);
  else multiply_many_signs(s);
}

// --- one block as a part ---

inline SignArgs args_of(const PartArgs& p, const uint8_t* const* blocks) {
  SignArgs s{p.x, p.n_tokens, p.n_cols, blocks, 1, p.n_rows, 0, false, p.add, p.out, p.scratch, p.n_threads};
  const int64_t none = sign_bytes(s);
  s.rank = 1;
  s.rank = (p.n_bytes - none) / (sign_bytes(s) - none);
  return s;
}
inline const char* sign_part_flaw(const PartArgs& p) {
  const SignArgs s = args_of(p, nullptr);
  const bool sound = s.rank >= 1 && s.rank <= kMostSignRanks && sign_bytes(s) == p.n_bytes;
  return sound ? nullptr : "bytes of no rank from 1 to 64";
}
inline int64_t sign_part_scratch(const PartArgs& p) { return sign_scratch(args_of(p, nullptr)); }
inline void sign_part_matmul(const PartArgs& p) { sign_matmul(args_of(p, &p.data)); }
