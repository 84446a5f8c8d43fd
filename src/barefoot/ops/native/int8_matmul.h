// Products of quantized weights with activations rounded to int8: integer sums within a group, float32 across groups.
#pragma once

struct Quantized8 {      // [n_tokens, n_cols] as codes and scales
  int8_t* code;
  float* scale;          // one per token and 32 columns
  float* sum32;          // scale * sum of codes, per 32 columns
  float* sum16;          // the same per 16 columns
  int32_t* minus2;       // -2 * sum of codes, per 32 columns: what zero points, all powers of two, are applied with
  int64_t n_cols;
};

constexpr float kSmallest = 7.888609052210118e-31f;  // 2^-100: groups of smaller magnitude count as zero

inline void quantize_token(const float* x, int64_t token, const Quantized8& to) {
  const int64_t n = to.n_cols, groups = n / kGroup;
  int8_t* code = to.code + token * n;
  float *scale = to.scale + token * groups, *sum32 = to.sum32 + token * groups, *sum16 = to.sum16 + token * groups * 2;
  int32_t* minus2 = to.minus2 + token * groups;
  bool finite = true;
  for (int64_t g = 0; g < groups; ++g, x += kGroup, code += kGroup) {
    int32_t bits[kGroup];
    std::memcpy(bits, x, sizeof bits);
    int32_t largest_bits = 0;  // magnitudes of floats order as their bits do, with infinity and NaN on top
    for (int i = 0; i < kGroup; ++i) {
      const int32_t magnitude = bits[i] & 0x7fffffff;
      largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
    }
    finite = finite && largest_bits < 0x7f800000;
    float largest;
    std::memcpy(&largest, &largest_bits, 4);
    const bool used = finite && largest >= kSmallest;
    const float inverse = used ? 127.0f / largest : 0.0f;
    int32_t rounded[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
      const float shifted = (used ? x[i] : 0.0f) * inverse + 12582912.0f;
      std::memcpy(&rounded[i], &shifted, 4);
      rounded[i] -= 0x4b400000;
      code[i] = static_cast<int8_t>(rounded[i]);
    }
    int32_t low = 0, high = 0;
    for (int i = 0; i < 16; ++i) low += rounded[i];
    for (int i = 16; i < 32; ++i) high += rounded[i];
    scale[g] = used ? largest / 127.0f : 0.0f;
    sum16[2 * g] = scale[g] * static_cast<float>(low);
    sum16[2 * g + 1] = scale[g] * static_cast<float>(high);
    sum32[g] = scale[g] * static_cast<float>(low + high);
    minus2[g] = -2 * (low + high);
  }
  if (!finite) {
    for (int64_t g = 0; g < groups; ++g) scale[g] = sum32[g] = sum16[2 * g] = sum16[2 * g + 1] = NAN;
  }
}

// --- few tokens: four rows against one token, straight from the packed blocks ---

constexpr int kRows = 4;

template <class Format>
void dot_rows(const uint8_t* const* rows, const Quantized8& x, int64_t token, float* out) {
  constexpr int groups_in_block = Format::elements / Format::group;
  const int64_t n_blocks = x.n_cols / Format::elements, groups = x.n_cols / kGroup;
  const int8_t* code = x.code + token * x.n_cols;
  const float *scale_x = x.scale + token * groups, *sum32 = x.sum32 + token * groups, *sum16 = x.sum16 + token * groups * 2;
  Lanes8 lanes[kRows];
  float rest[kRows];  // what the offsets add
  for (int r = 0; r < kRows; ++r) {
    lanes[r] = zero_lanes();
    rest[r] = 0.0f;
  }
  for (int64_t b = 0; b < n_blocks; ++b) {
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* block = rows[r] + b * Format::bytes;
      float scale[groups_in_block], offset[groups_in_block];
      folded_scales<Format>(block, scale, offset);
      BAREFOOT_UNROLL  // so that the shifts of each chunk's codes are constants
      for (int c = 0; c < Format::elements / 32; ++c) {
        const int64_t g = b * (Format::elements / 32) + c;
        const Sums8 products = dot_codes<Format::wide>(Format::codes(block, c), code + g * kGroup);
        if constexpr (Format::group == 16) {
          lanes[r] = accumulate(lanes[r], products, scale[2 * c] * scale_x[g], scale[2 * c + 1] * scale_x[g]);
          rest[r] += offset[2 * c] * sum16[2 * g] + offset[2 * c + 1] * sum16[2 * g + 1];
        } else {
          lanes[r] = accumulate(lanes[r], products, scale[c] * scale_x[g]);
          rest[r] += offset[c] * sum32[g];
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = reduce_add(lanes[r]) + rest[r];
}

// --- many tokens: a tile of 32 rows is unpacked once, then meets all tokens ---

struct Tile {
  uint8_t* code;  // [columns / 4][32 rows][4]
  float* scale;   // [groups][32 rows]
  float* offset;
};

template <class Format>
void unpack_tile(const uint8_t* const* rows, int n_rows, int64_t k0, int64_t n, const Tile& tile) {
  constexpr int groups_in_block = Format::elements / Format::group;
  for (int r = 0; r < n_rows; ++r) {
    const uint8_t* block = rows[r] + k0 / Format::elements * Format::bytes;
    uint8_t* code_to = tile.code + 4 * r;
    float *scale_to = tile.scale + r, *offset_to = tile.offset + r;
    for (int64_t k = 0; k < n; k += Format::elements, block += Format::bytes) {
      float scale[groups_in_block], offset[groups_in_block];
      folded_scales<Format>(block, scale, offset);
      for (int g = 0; g < groups_in_block; ++g, scale_to += kRowTile, offset_to += kRowTile) {
        *scale_to = scale[g];
        *offset_to = offset[g];
      }
      BAREFOOT_UNROLL
      for (int c = 0; c < Format::elements / 32; ++c) {
        uint8_t code[32];
        store(code, Format::codes(block, c));
        for (int q = 0; q < 8; ++q, code_to += 4 * kRowTile) std::memcpy(code_to, code + 4 * q, 4);
      }
    }
  }
}

// out[t][r] (+)= tile row r · token t, for n columns from k0, `Tokens` tokens and the first n_rows rows.
template <int Group, bool Wide, int Tokens>
void multiply_tile(const Tile& tile, const Quantized8& x, int64_t token, int64_t k0, int64_t n, float* out,
                   int64_t out_stride, int n_rows, bool add) {
  const int64_t groups32 = x.n_cols / kGroup;
  const int8_t* code[Tokens];
  const float *scale_x[Tokens], *sum_x[Tokens];
  for (int t = 0; t < Tokens; ++t) {
    code[t] = x.code + (token + t) * x.n_cols + k0;
    scale_x[t] = x.scale + (token + t) * groups32 + k0 / kGroup;
    sum_x[t] = Group == 16 ? x.sum16 + ((token + t) * groups32 + k0 / kGroup) * 2
                           : x.sum32 + (token + t) * groups32 + k0 / kGroup;
  }
  for (int r0 = 0; r0 < n_rows; r0 += kTileVectors * kLanes) {
    F total[Tokens][kTileVectors];
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < kTileVectors; ++v) total[t][v] = set1(0.0f);
    for (int64_t g = 0; g < n / Group; ++g) {
      I sum[Tokens][kTileVectors];
      for (int t = 0; t < Tokens; ++t)
        for (int v = 0; v < kTileVectors; ++v) sum[t][v] = zero_int();
      for (int q = 0; q < Group / 4; ++q) {
        const uint8_t* quads = tile.code + ((g * (Group / 4) + q) * kRowTile + r0) * 4;
        Quads w[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) w[v] = load_quads(quads + 4 * v * kLanes);
        for (int t = 0; t < Tokens; ++t) {
          const Quads quad = repeat_quad(code[t] + g * Group + 4 * q);
          for (int v = 0; v < kTileVectors; ++v) sum[t][v] = dot_quads<Wide>(sum[t][v], w[v], quad);
        }
      }
      for (int v = 0; v < kTileVectors; ++v) {
        const F scale = load(tile.scale + g * kRowTile + r0 + v * kLanes);
        const F offset = load(tile.offset + g * kRowTile + r0 + v * kLanes);
        for (int t = 0; t < Tokens; ++t) {
          total[t][v] = fma(to_float(sum[t][v]), scale * set1(scale_x[t][g * Group / kGroup]), total[t][v]);
          total[t][v] = fma(offset, set1(sum_x[t][g]), total[t][v]);
        }
      }
    }
    for (int t = 0; t < Tokens; ++t) {
      for (int v = 0; v < kTileVectors; ++v) {
        float* to = out + t * out_stride + r0 + v * kLanes;
        const int left = n_rows - r0 - v * kLanes;
        if (left >= kLanes) {
          store(to, add ? load(to) + total[t][v] : total[t][v]);
          continue;
        }
        float each[kLanes];
        store(each, total[t][v]);
        for (int i = 0; i < left; ++i) to[i] = add ? to[i] + each[i] : each[i];
      }
    }
  }
}

template <int Group, bool Wide>
void multiply_tile_all(const Tile& tile, const Quantized8& x, int64_t n_tokens, int64_t k0, int64_t n, float* out,
                       int64_t out_stride, int n_rows, bool add) {
  int64_t t = 0;
  const auto take = [&](auto tokens) {
    for (; t + tokens.value <= n_tokens; t += tokens.value)
      multiply_tile<Group, Wide, tokens.value>(tile, x, t, k0, n, out + t * out_stride, out_stride, n_rows, add);
  };
  take(Constant<kTileTokens>{});
  take(Constant<kTileTokens / 2>{});
  take(Constant<1>{});
}
