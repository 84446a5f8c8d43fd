// Products in float32: rows are decoded into a small tile and dotted with the tokens.
#pragma once

// The first n < kLanes numbers at p, then zeros.
inline F load_first(const float* p, int64_t n) {
  float padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(float));
  return load(padded);
}

// out[t * out_stride + r] = rows[r] · tokens[t] over n columns, for 4 rows and `Tokens` tokens. Each sum takes the same
// order whatever the block, so results don't depend on how tokens are grouped.
template <int Tokens>
void dot_block(const float* rows, int64_t row_stride, const float* tokens, int64_t token_stride, int64_t n, float* out,
               int64_t out_stride) {
  F sum[Tokens][kRows];
  for (int t = 0; t < Tokens; ++t)
    for (int r = 0; r < kRows; ++r) sum[t][r] = set1(0.0f);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    F x[Tokens];
    for (int t = 0; t < Tokens; ++t) x[t] = load(tokens + t * token_stride + k);
    for (int r = 0; r < kRows; ++r) {
      const F w = load(rows + r * row_stride + k);
      for (int t = 0; t < Tokens; ++t) sum[t][r] = fma(w, x[t], sum[t][r]);
    }
  }
  if (k < n) {
    F x[Tokens];
    for (int t = 0; t < Tokens; ++t) x[t] = load_first(tokens + t * token_stride + k, n - k);
    for (int r = 0; r < kRows; ++r) {
      const F w = load_first(rows + r * row_stride + k, n - k);
      for (int t = 0; t < Tokens; ++t) sum[t][r] = fma(w, x[t], sum[t][r]);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int r = 0; r < kRows; ++r) out[t * out_stride + r] = reduce_add(sum[t][r]);
}

// The same for any number of tokens.
inline void dot_tokens(const float* rows, int64_t row_stride, const float* tokens, int64_t token_stride,
                       int64_t n_tokens, int64_t n, float* out, int64_t out_stride) {
  int64_t t = 0;
  for (; t + kDotTokens <= n_tokens; t += kDotTokens)
    dot_block<kDotTokens>(rows, row_stride, tokens + t * token_stride, token_stride, n, out + t * out_stride, out_stride);
  for (; t < n_tokens; ++t)
    dot_block<1>(rows, row_stride, tokens + t * token_stride, token_stride, n, out + t * out_stride, out_stride);
}

// n weights of a row from column k0 on, out of a matrix of n_cols.
using Dequantize = void(const uint8_t* data, int64_t n_cols, int64_t row, int64_t k0, int64_t n, float* out);

inline void multiply_float(Dequantize* dequantize, const uint8_t* data, int64_t row0, int64_t n_rows, const float* x,
                    int64_t n_tokens, int64_t n_cols, float* tile, float* out, int64_t out_stride, bool add) {
  const int64_t width = n_cols < kColumnBlock ? round_up(n_cols, 32) : kColumnBlock;
  for (int64_t k0 = 0; k0 < n_cols; k0 += kColumnBlock) {
    const int64_t n = n_cols - k0 < kColumnBlock ? n_cols - k0 : kColumnBlock;
    for (int64_t r = 0; r < n_rows; ++r) dequantize(data, n_cols, row0 + r, k0, n, tile + r * width);
    for (int64_t r = n_rows; r % kRows; ++r) std::memset(tile + r * width, 0, n * sizeof(float));
    for (int64_t t = 0; t < n_tokens; ++t) {
      const int64_t block = t + kDotTokens <= n_tokens ? kDotTokens : 1;
      for (int64_t r0 = 0; r0 < n_rows; r0 += kRows) {
        float part[kDotTokens * kRows];
        dot_tokens(tile + r0 * width, width, x + t * n_cols + k0, n_cols, block, n, part, kRows);
        for (int64_t i = 0; i < block; ++i) {
          for (int64_t r = 0; r < kRows && r0 + r < n_rows; ++r) {
            float* to = out + (t + i) * out_stride + row0 + r0 + r;
            *to = add || k0 > 0 ? *to + part[i * kRows + r] : part[i * kRows + r];
          }
        }
      }
      t += block - 1;
    }
  }
}
