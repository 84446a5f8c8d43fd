// KV rows (layouts in kvrows.py): decoding to float32, and storing new positions.
#pragma once

// One group of q8 or q4 of any even size; with a constant size q8 becomes straight vector code.
inline void decode_kv_group(KvFormat format, const uint8_t* p, int64_t size, float* out) {
  const float scale = half_at(p);
  if (format == KvFormat::q8) {
    for (int64_t i = 0; i < size; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(p[2 + i]));
    return;
  }
  const float low = half_at(p + 2);
  for (int64_t i = 0; i < size / 2; ++i) {
    out[i] = scale * static_cast<float>(p[4 + i] & 15) + low;
    out[size / 2 + i] = scale * static_cast<float>(p[4 + i] >> 4) + low;
  }
}

inline void decode_whole_q4(const uint8_t* p, float* out) {
  const float scale = half_at(p), low = half_at(p + 2);
  uint8_t code[kGroup];
  store(code, nibbles(p + 4));
  for (int i = 0; i < kGroup; ++i) out[i] = scale * static_cast<float>(code[i]) + low;
}

inline void decode_kv_row(const KvShape& kv, const uint8_t* p, float* out, int64_t width) {
  const int64_t n = kv.head_dim;
  if (kv.format == KvFormat::f32) {
    F32::to_float(p, n, out);
  } else if (kv.format == KvFormat::f16) {
    F16::to_float(p, n, out);
  } else {
    const bool q8 = kv.format == KvFormat::q8;
    const int64_t whole = n / kGroup * kGroup;
    for (int64_t at = 0; at < whole; at += kGroup, p += q8 ? 2 + kGroup : 4 + kGroup / 2) {
      if (q8) decode_kv_group(KvFormat::q8, p, kGroup, out + at);
      else decode_whole_q4(p, out + at);
    }
    if (whole < n) decode_kv_group(kv.format, p, n - whole, out + whole);
  }
  for (int64_t i = n; i < width; ++i) out[i] = 0.0f;
}

// A vector of the elements from d on, a multiple of kLanes.
struct HalfRow {
  static F part(const uint8_t* row, int64_t d) { return load_half(row + 2 * d); }
};
struct FloatRow {
  static F part(const uint8_t* row, int64_t d) { return load(row + 4 * d); }
};

inline void encode_kv_group(KvFormat format, const float* x, int64_t n, uint8_t* p) {
  const bool q8 = format == KvFormat::q8;
  float low = x[0], high = x[0];
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::fabs(x[i]) <= 3.4028234663852886e38f;
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  const float span = q8 ? (high > -low ? high : 0.0f - low) / 127.0f : (high - low) / 15.0f;
  uint16_t scale16 = float_to_half(span), low16 = q8 ? 0 : float_to_half(low);
  finite = finite && (scale16 & 0x7c00) != 0x7c00 && (low16 & 0x7c00) != 0x7c00;
  if (!finite) scale16 = 0x7e00, low16 = 0;  // NaN
  const float scale = half_to_float(scale16), base = half_to_float(low16);
  const float inverse = finite && scale != 0.0f ? 1.0f / scale : 0.0f;
  const auto code = [&](int64_t i) {
    if (!finite) return 0;
    const float steps = (x[i] - base) * inverse;
    const float bottom = q8 ? -127.0f : 0.0f, top = q8 ? 127.0f : 15.0f;
    return static_cast<int>(std::nearbyint(steps < bottom ? bottom : steps > top ? top : steps));
  };
  std::memcpy(p, &scale16, 2);
  if (q8) {
    for (int64_t i = 0; i < n; ++i) p[2 + i] = static_cast<uint8_t>(code(i));
  } else {
    std::memcpy(p + 2, &low16, 2);
    for (int64_t i = 0; i < n / 2; ++i) p[4 + i] = static_cast<uint8_t>(code(i) | code(n / 2 + i) << 4);
  }
}

inline void kv_append(const float* rows, int64_t n_tokens, const KvShape& kv, int64_t start, uint8_t* buffer) {
  const int64_t row_bytes = kv.row_bytes(), n = kv.head_dim;
  const auto one_token = [&](int64_t token, int) {
    const int64_t slot = (start + token) % kv.capacity;
    for (int64_t h = 0; h < kv.n_kv_heads; ++h) {
      const float* x = rows + (token * kv.n_kv_heads + h) * n;
      uint8_t* p = buffer + (h * kv.capacity + slot) * row_bytes;
      if (kv.format == KvFormat::f32) {
        std::memcpy(p, x, n * sizeof(float));
        continue;
      }
      if (kv.format == KvFormat::f16) {
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) store_half(p + 2 * i, load(x + i));
        for (; i < n; ++i) {
          const uint16_t half = float_to_half(x[i]);
          std::memcpy(p + 2 * i, &half, 2);
        }
        continue;
      }
      for (int64_t at = 0; at < n; at += kGroup) {
        const int64_t size = n - at < kGroup ? n - at : kGroup;
        encode_kv_group(kv.format, x + at, size, p);
        p += kv.format == KvFormat::q8 ? 2 + size : 4 + size / 2;
      }
    }
  };
  parallel_for(n_tokens, n_tokens * kv.n_kv_heads * n < kParallel ? 1 : n_threads(), one_token);
}
