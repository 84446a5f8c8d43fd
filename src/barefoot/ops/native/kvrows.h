// KV rows (layouts in kvrows.py): decoding to float32, and storing new positions.
#pragma once

// The bits of codes above a minimum; 0 for other formats.
constexpr int affine_bits(KvFormat format) {
  return format == KvFormat::q4 ? 4 : format == KvFormat::q3 ? 3 : format == KvFormat::q2 ? 2 : 0;
}

// body(i, code i) of `size` codes of 2, 3 or 4 bits.
template <class Body>
inline void each_packed(const uint8_t* p, int bits, int64_t size, Body body) {
  const int width = bits == 4 ? 4 : 2, mask = (1 << width) - 1;
  const int64_t each = size * width / 8;
  for (int part = 0; part < 8 / width; ++part)
    for (int64_t j = 0; j < each; ++j) {
      const int64_t i = part * each + j;
      const int high = bits == 3 ? (p[each + i / 8] >> (i % 8) & 1) << 2 : 0;
      body(i, (p[j] >> (width * part) & mask) | high);
    }
}

inline float block_step(uint8_t exponent) {  // of bfp4
  if (exponent == 255) return NAN;
  const uint32_t bits = static_cast<uint32_t>(exponent) << 23;
  float step;
  std::memcpy(&step, &bits, 4);
  return step;
}

// One group of any even size; with a constant size q8 becomes straight vector code.
inline void decode_kv_group(KvFormat format, const uint8_t* p, int64_t size, float* out) {
  if (format == KvFormat::bfp4) {
    const float step = block_step(p[0]);
    return each_packed(p + 1, 4, size, [&](int64_t i, int code) { out[i] = step * static_cast<float>(code - 8); });
  }
  const float scale = half_at(p);
  if (format == KvFormat::q8) {
    for (int64_t i = 0; i < size; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(p[2 + i]));
    return;
  }
  const float low = half_at(p + 2);
  each_packed(p + 4, affine_bits(format), size,
              [&](int64_t i, int code) { out[i] = scale * static_cast<float>(code) + low; });
}

// The codes of a whole group, as bytes.
template <int Bits>
inline Codes unpack_group(const uint8_t* p) {
  if constexpr (Bits == 4) return nibbles(p);
  else if constexpr (Bits == 3) return pairs(p) | bits(p + 8, 4);
  else return pairs(p);
}

template <int Bits>
inline void decode_whole(const uint8_t* p, float* out) {
  const float scale = half_at(p), low = half_at(p + 2);
  uint8_t code[kGroup];
  store(code, unpack_group<Bits>(p + 4));
  for (int i = 0; i < kGroup; ++i) out[i] = scale * static_cast<float>(code[i]) + low;
}

inline void decode_kv_row(const KvShape& kv, const uint8_t* p, float* out, int64_t width) {
  const int64_t n = kv.head_dim;
  if (kv.format == KvFormat::f32) {
    F32::to_float(p, n, out);
  } else if (kv.format == KvFormat::f16) {
    F16::to_float(p, n, out);
  } else {
    const int64_t whole = n / kGroup * kGroup, group_bytes = kv_row_bytes(kv.format, kGroup);
    for (int64_t at = 0; at < whole; at += kGroup, p += group_bytes) {
      switch (kv.format) {
        case KvFormat::q8: decode_kv_group(KvFormat::q8, p, kGroup, out + at); break;
        case KvFormat::q4: decode_whole<4>(p, out + at); break;
        case KvFormat::q3: decode_whole<3>(p, out + at); break;
        case KvFormat::q2: decode_whole<2>(p, out + at); break;
        default: decode_kv_group(KvFormat::bfp4, p, kGroup, out + at);
      }
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

// Codes of 2, 3 or 4 bits, as each_packed reads them.
template <class Code>
inline void pack_group(int bits, int64_t n, uint8_t* p, Code code) {
  const int width = bits == 4 ? 4 : 2, mask = (1 << width) - 1;
  const int64_t each = n * width / 8;
  std::memset(p, 0, n * bits / 8);
  for (int part = 0; part < 8 / width; ++part)
    for (int64_t j = 0; j < each; ++j) {
      const int64_t i = part * each + j;
      const int whole = code(i);
      p[j] |= static_cast<uint8_t>((whole & mask) << (width * part));
      if (bits == 3) p[each + i / 8] |= static_cast<uint8_t>(whole >> 2 << (i % 8));
    }
}

inline void encode_float_block(const float* x, int64_t n, uint8_t* p) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = std::fabs(x[i]);
    finite = finite && magnitude <= 3.4028234663852886e38f;
    largest = magnitude > largest ? magnitude : largest;
  }
  int exponent = 0;
  std::frexp(finite ? largest : 1.0f, &exponent);
  exponent += 127 - 3;
  const bool used = finite && largest > 0.0f && exponent > 0;
  p[0] = used ? static_cast<uint8_t>(exponent) : finite ? 0 : 255;
  const float step = used ? block_step(p[0]) : 1.0f;
  pack_group(4, n, p + 1, [&](int64_t i) {
    const float steps = used ? x[i] / step : 0.0f;
    return 8 + static_cast<int>(std::nearbyint(steps < -7.0f ? -7.0f : steps > 7.0f ? 7.0f : steps));
  });
}

inline void encode_kv_group(KvFormat format, const float* x, int64_t n, uint8_t* p) {
  if (format == KvFormat::bfp4) return encode_float_block(x, n, p);
  const bool q8 = format == KvFormat::q8;
  const int bits = affine_bits(format);
  float low = x[0], high = x[0];
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::fabs(x[i]) <= 3.4028234663852886e38f;
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  const float bottom = q8 ? -127.0f : 0.0f, top = q8 ? 127.0f : static_cast<float>((1 << bits) - 1);
  const float span = q8 ? (high > -low ? high : 0.0f - low) / top : (high - low) / top;
  uint16_t scale16 = float_to_half(span), low16 = q8 ? 0 : float_to_half(low);
  finite = finite && (scale16 & 0x7c00) != 0x7c00 && (low16 & 0x7c00) != 0x7c00;
  if (!finite) scale16 = 0x7e00, low16 = 0;  // NaN
  const float scale = half_to_float(scale16), base = half_to_float(low16);
  const float inverse = finite && scale != 0.0f ? 1.0f / scale : 0.0f;
  const auto code = [&](int64_t i) {
    if (!finite) return 0;
    const float steps = (x[i] - base) * inverse;
    return static_cast<int>(std::nearbyint(steps < bottom ? bottom : steps > top ? top : steps));
  };
  std::memcpy(p, &scale16, 2);
  if (q8) {
    for (int64_t i = 0; i < n; ++i) p[2 + i] = static_cast<uint8_t>(code(i));
  } else {
    std::memcpy(p + 2, &low16, 2);
    pack_group(bits, n, p + 4, code);
  }
}

inline void encode_kv_row(const KvShape& kv, const float* x, uint8_t* p) {
  const int64_t n = kv.head_dim;
  if (kv.format == KvFormat::f32) {
    std::memcpy(p, x, n * sizeof(float));
    return;
  }
  if (kv.format == KvFormat::f16) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_half(p + 2 * i, load(x + i));
    for (; i < n; ++i) {
      const uint16_t half = float_to_half(x[i]);
      std::memcpy(p + 2 * i, &half, 2);
    }
    return;
  }
  for (int64_t at = 0; at < n; at += kGroup) {
    const int64_t size = n - at < kGroup ? n - at : kGroup;
    encode_kv_group(kv.format, x + at, size, p);
    p += kv_row_bytes(kv.format, size);
  }
}

// Rows [n_tokens, n_kv_heads * head_dim]; slot(head, token) says where each goes.
template <class Slot>
inline void write_rows(const float* rows, int64_t n_tokens, const KvShape& kv, uint8_t* buffer, Slot slot) {
  const int64_t row_bytes = kv.row_bytes(), n = kv.head_dim;
  parallel_for(n_tokens, n_tokens * kv.n_kv_heads * n < kParallel ? 1 : n_threads(), [&](int64_t token, int) {
    for (int64_t h = 0; h < kv.n_kv_heads; ++h)
      encode_kv_row(kv, rows + (token * kv.n_kv_heads + h) * n, buffer + (h * kv.capacity + slot(h, token)) * row_bytes);
  });
}

inline void kv_append(const float* rows, int64_t n_tokens, const KvShape& kv, int64_t start, uint8_t* buffer) {
  write_rows(rows, n_tokens, kv, buffer, [&](int64_t, int64_t token) { return (start + token) % kv.capacity; });
}

// slots: [n_kv_heads, n_tokens].
inline void kv_write(const float* rows, int64_t n_tokens, const KvShape& kv, const int32_t* slots, uint8_t* buffer) {
  write_rows(rows, n_tokens, kv, buffer, [&](int64_t h, int64_t token) -> int64_t { return slots[h * n_tokens + token]; });
}
