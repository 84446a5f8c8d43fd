// Products of many tokens in tile registers: weights and activations rounded to bfloat16, sums in float32.
//
// With integers every 32 columns would end in a rescaling of all sums. As bfloat16 the weights carry their scales, so
// sums stay in their tiles across all columns; what a weight costs on its way is shared by the tokens.
#pragma once

#if defined(BAREFOOT_AMX)
constexpr bool kHasTiles = true;
static_assert(kUnsignedBytes && kLanes == kTileSide && kRowTile == 2 * kTileSide && kGroup == kTileDepth);

// --- tokens: panels of 32, and a last one of 16 or 32, each [columns / 32][tokens][32] ---

constexpr int64_t kTokenPanel = 2 * kTileSide;

// Token t of n_tokens. From 2^128 - 2^119 on a magnitude would round to infinity: a token that holds one, infinity or
// NaN becomes NaN. Tokens that fill up the last panel stay as they are; what they give is dropped.
inline void round_token(const float* x, int64_t t, int64_t n_tokens, int64_t n_cols, uint16_t* to) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), limit = _mm512_set1_epi32(0x7f7f8000);
  const int64_t first = t / kTokenPanel * kTokenPanel;
  const int64_t stride = (n_tokens - first > kTileSide ? kTokenPanel : kTileSide) * kTileDepth;
  to += first * n_cols + (t - first) * kTileDepth;
  __mmask16 bad = 0;
  const auto load_checked = [&](const float* p) {
    const __m512 a = _mm512_loadu_ps(p);
    bad |= _mm512_cmpge_epi32_mask(_mm512_and_si512(_mm512_castps_si512(a), magnitude), limit);
    return a;
  };
  for (int64_t k = 0; k < n_cols; k += kTileDepth) {
    const __m512 low = load_checked(x + k), high = load_checked(x + k + kLanes);
    _mm512_storeu_si512(to + k / kTileDepth * stride, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
  for (int64_t k = 0; bad && k < n_cols; k += kTileDepth)
    _mm512_storeu_si512(to + k / kTileDepth * stride, _mm512_set1_epi16(0x7fc0));
}

// --- weights ---

// 32 rows and n columns as bfloat16: [n / 32][2][16 pairs of columns][16 rows][2]. Before they are rounded the weights
// are those of dequantize_row, bit for bit.
inline void weave(const Tile& tile, int64_t group, int64_t n, uint16_t* to) {
  // As in the result, lanes take turns between the columns of a pair: the lower half holds rows 0 to 7, the upper one 8
  // to 15. A quad of codes has two pairs.
  const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const auto bytes = [](__m512i row, int64_t pair) {
    const __m512i columns = _mm512_set1_epi64((2 * pair + 1) << 32 | 2 * pair);
    return _mm512_add_epi32(_mm512_slli_epi32(row, 2), columns);
  };
  const __m512i low_bytes[2] = {bytes(low, 0), bytes(low, 1)}, high_bytes[2] = {bytes(high, 0), bytes(high, 1)};
  for (int64_t k = 0; k < n; k += kTileDepth) {
    for (int64_t row = 0; row < kRowTile; row += kTileSide) {
      for (int64_t half = k; half < k + kTileDepth; half += 16) {
        const int64_t at_scale = half / group * kRowTile + row;
        const __m512 scale = load(tile.scale + at_scale).v, offset = load(tile.offset + at_scale).v;
        const __m512 scale_low = _mm512_permutexvar_ps(low, scale), scale_high = _mm512_permutexvar_ps(high, scale);
        const __m512 offset_low = _mm512_permutexvar_ps(low, offset), offset_high = _mm512_permutexvar_ps(high, offset);
        for (int64_t at = half; at < half + 16; at += 4) {
          const __m512i quad = load_quads(tile.code + at * kRowTile + 4 * row);
          for (int pair = 0; pair < 2; ++pair, to += 2 * kTileSide) {
            constexpr __mmask64 lowest = 0x1111111111111111;  // byte of each lane
            const __m512i code_low = _mm512_maskz_permutexvar_epi8(lowest, low_bytes[pair], quad);
            const __m512i code_high = _mm512_maskz_permutexvar_epi8(lowest, high_bytes[pair], quad);
            const __m512 w_low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code_low), scale_low, offset_low);
            const __m512 w_high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code_high), scale_high, offset_high);
            _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(w_high, w_low)));
          }
        }
      }
    }
  }
}

// --- products ---

// c[t][r] (+)= 32 rows · 16 or 32 tokens over n columns. Tiles 0 to 3 sum, 4 and 5 hold tokens, 6 and 7 weights. Never
// inline: in the loops around it the compiler runs out of registers for the addresses.
template <int TokenTiles>
[[gnu::noinline]] void multiply_tile_block(const uint16_t* x, const uint16_t* w, int64_t n, float* c, bool add) {
  constexpr bool two = TokenTiles == 2;
  constexpr int64_t stride = kRowTile * sizeof(float);
  float* const lower = c + kTileSide * kRowTile;
  if (add) {
    load_tile<0>(c, stride);
    load_tile<1>(c + kTileSide, stride);
    if constexpr (two) {
      load_tile<2>(lower, stride);
      load_tile<3>(lower + kTileSide, stride);
    }
  } else {
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (two) {
      zero_tile<2>();
      zero_tile<3>();
    }
  }
  for (int64_t k = 0; k < n; k += kTileDepth, x += TokenTiles * kTileSide * kTileDepth, w += kRowTile * kTileDepth) {
    load_tile<6>(w);
    load_tile<4>(x);
    multiply_tiles<0, 4, 6>();
    load_tile<7>(w + kTileSide * kTileDepth);
    multiply_tiles<1, 4, 7>();
    if constexpr (two) {
      load_tile<5>(x + kTileSide * kTileDepth);
      multiply_tiles<2, 5, 6>();
      multiply_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(c, stride);
  store_tile<1>(c + kTileSide, stride);
  if constexpr (two) {
    store_tile<2>(lower, stride);
    store_tile<3>(lower + kTileSide, stride);
  }
}

// Rows [begin, end) of a weight and all tokens, of which a block at a time stays in the second-level cache.
// `weave(r0, n_rows, k0, n)` puts n <= width columns of 32 rows into `woven`; `sums` are [tokens of a block][32 rows].
template <class Weave>
void multiply_woven(const uint16_t* x, int64_t all_tokens, int64_t n_cols, float* out, int64_t out_stride, int64_t begin,
                    int64_t end, bool add, int64_t width, const uint16_t* woven, float* sums, Weave weave) {
  const Tiles tiles;
  for (int64_t t0 = 0; t0 < all_tokens; t0 += kBfloat16Block) {
    const int64_t n_tokens = all_tokens - t0 < kBfloat16Block ? all_tokens - t0 : kBfloat16Block;
    for (int64_t r0 = begin; r0 < end; r0 += kRowTile) {
      const int64_t n_rows = end - r0 < kRowTile ? end - r0 : kRowTile;
      for (int64_t k0 = 0; k0 < n_cols; k0 += width) {
        const int64_t n = n_cols - k0 < width ? n_cols - k0 : width;
        weave(r0, n_rows, k0, n);
        for (int64_t t = 0; t < n_tokens; t += kTokenPanel) {
          const uint16_t* panel = x + (t0 + t) * n_cols;
          float* to = sums + t * kRowTile;
          if (n_tokens - t > kTileSide) multiply_tile_block<2>(panel + k0 * kTokenPanel, woven, n, to, k0 > 0);
          else multiply_tile_block<1>(panel + k0 * kTileSide, woven, n, to, k0 > 0);
        }
      }
      for (int64_t t = 0; t < n_tokens; ++t) {
        float* to = out + (t0 + t) * out_stride + r0;
        const float* sum = sums + t * kRowTile;
        if (n_rows == kRowTile) {
          for (int64_t i = 0; i < kRowTile; i += kLanes)
            store(to + i, add ? load(to + i) + load(sum + i) : load(sum + i));
        } else {
          for (int64_t i = 0; i < n_rows; ++i) to[i] = add ? to[i] + sum[i] : sum[i];
        }
      }
    }
  }
}

// The same of blocks with codes and scales. `fill(r0, n, k0, columns, tile)` unpacks whole blocks of the format,
// `elements` columns each.
template <class Fill>
void multiply_in_tiles(const MatmulArgs& m, const uint16_t* x, int64_t elements, int64_t group, float* out,
                       int64_t out_stride, int64_t begin, int64_t end, uint8_t* scratch, Fill fill) {
  const int64_t pieces = (m.n_cols + kBfloat16Columns - 1) / kBfloat16Columns;
  const int64_t width = round_up((m.n_cols + pieces - 1) / pieces, elements);
  Tile tile{scratch, reinterpret_cast<float*>(scratch + kRowTile * width), nullptr};
  tile.offset = tile.scale + kRowTile * (width / 16);
  uint16_t* const woven = reinterpret_cast<uint16_t*>(tile.offset + kRowTile * (width / 16));
  float* const sums = reinterpret_cast<float*>(woven + kRowTile * width);
  multiply_woven(x, m.n_tokens, m.n_cols, out, out_stride, begin, end, m.add, width, woven, sums,
                 [&](int64_t r0, int64_t n_rows, int64_t k0, int64_t n) {
                   for (int64_t k = 0; k < n; k += elements) {  // codes of a block stay in the first-level cache
                     fill(r0, n_rows, k0 + k, elements, tile);
                     weave(tile, group, elements, woven + k * kRowTile);
                   }
                 });
}

#else
constexpr bool kHasTiles = false;
inline void round_token(const float*, int64_t, int64_t, int64_t, uint16_t*) {}
template <class Weave>
void multiply_woven(const uint16_t*, int64_t, int64_t, float*, int64_t, int64_t, int64_t, bool, int64_t,
                    const uint16_t*, float*, Weave) {}
template <class Fill>
void multiply_in_tiles(const MatmulArgs&, const uint16_t*, int64_t, int64_t, float*, int64_t, int64_t, int64_t,
                       uint8_t*, Fill) {}
#endif
