// Panels: 16 rows interleaved, as panels.py describes bit by bit. A lane is a row, so sums never cross lanes.
#pragma once

// Bring the bytes that follow those at p, n of them at a time, nearer: the next ones into the first-level cache, which
// also keeps the processor's own prefetching into the second level ahead of the work, and those far ahead into the
// second level. Either alone reads at three quarters of what both reach.
constexpr int64_t kNearBytes = 640, kFarBytes = 4096;
inline void fetch_ahead(const uint8_t* p, int64_t n) {
  for (int64_t line = 0; line < n; line += 64) {
#if defined(__GNUC__)
    __builtin_prefetch(p + kNearBytes + line, 0, 3);
    __builtin_prefetch(p + kFarBytes + line, 0, 2);
#elif defined(_M_X64)
    _mm_prefetch(reinterpret_cast<const char*>(p + kNearBytes + line), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(p + kFarBytes + line), _MM_HINT_T1);
#endif
  }
}

// What the codes of several formats have in common: the kernels take the size of a group, in chunks of 32 columns, as a
// number. SubBytes: of each row's sub-scales (super_panels.h).
template <int Bits, bool HasOffset, int Zero, int SubBytes, int ScaleBytes, class CodeLevels>
struct Panel {
  using Levels = CodeLevels;
  static constexpr bool has_offset = HasOffset;
  static constexpr int bits = Bits, zero = Zero;
  static constexpr int low = bits == 5 || bits == 6 ? 4 : bits == 3 ? 2 : bits;  // bits of the first plane
  static constexpr int high = bits - low;                                        // of the second one, if there is one
  static constexpr int numbers = ScaleBytes * kPanelRows * (HasOffset ? 2 : 1);
  static constexpr int header = numbers + kPanelRows * SubBytes;
  static constexpr int chunk_bytes = 64 * bits;
  static constexpr bool flip = bits == 8 && !kUnsignedBytes;  // stored unsigned, multiplied signed
  static constexpr bool is_signed = flip || (Levels::indexed && Zero == 0);
  static constexpr int stored_zero = Zero + (flip ? 128 : 0);
  static constexpr int64_t group_bytes(int64_t chunks) { return header + chunks * chunk_bytes; }

  // Columns 4 Q .. 4 Q + 3 of a chunk for the rows from `row` on.
  template <int Q>
  static Quads quad(const uint8_t* chunk, int row) {
    constexpr int per_vector = 8 / low;
    const Quads vector = load_quads(chunk + 64 * (Q / per_vector) + 4 * row);
    if constexpr (flip) return flip_signs(vector);
    else if constexpr (bits == 8) return vector;
    else if constexpr (bits == low) return field<low * (Q % per_vector)>(vector, (1 << low) - 1);
    else {
      constexpr int per_high = 8 / high;
      const Quads more = load_quads(chunk + 64 * (low + Q / per_high) + 4 * row);
      return merge(field<low * (Q % per_vector)>(vector, (1 << low) - 1),
                   field<high * (Q % per_high) - low>(more, ((1 << high) - 1) << low));
    }
  }

  // Odd quads of 2 and 4 bits are multiplied where they stand, as 4 or 16 times their codes, which saves their shifts.
  // Products that are added in pairs in 16 bits have room for codes of 12, not of 240.
  static constexpr int raised = !Levels::indexed && (bits == 2 || (bits == 4 && kUnsignedBytes)) ? bits : 0;
  template <int Q>
  static Quads raised_quad(const uint8_t* chunk, int row) {
    constexpr int per_vector = 8 / low;
    return field<low * (Q % per_vector) - raised>(load_quads(chunk + 64 * (Q / per_vector) + 4 * row),
                                                  ((1 << low) - 1) << raised);
  }

  static F scales(const uint8_t* group, int row) {
    if constexpr (ScaleBytes == 2) return load_half(group + 2 * row);
    uint32_t exponents[kLanes];
    for (int i = 0; i < kLanes; ++i) exponents[i] = static_cast<uint32_t>(group[row + i]) << 23;
    return load(exponents);
  }
  // Offsets with the zero point folded in, for formats whose zero point is not applied in integers.
  static F offsets(const uint8_t* group, int row) {
    if constexpr (HasOffset && Zero == 0) return load_half(group + 32 + 2 * row);
    const F shift = scales(group, row) * set1(static_cast<float>(Zero));
    if constexpr (HasOffset) return load_half(group + 32 + 2 * row) - shift;
    else return set1(0.0f) - shift;
  }

  static int code(const uint8_t* chunk, int row, int column) {
    const int q = column / 4, per_vector = 8 / low, at = 4 * row + column % 4;
    int value = chunk[64 * (q / per_vector) + at] >> (low * (q % per_vector)) & ((1 << low) - 1);
    if constexpr (high > 0)
      value |= (chunk[64 * (low + q * high / 8) + at] >> (q * high % 8) & ((1 << high) - 1)) << low;
    return value;
  }
};

template <class Format>
using PanelOf = Panel<Format::code_bits, Format::has_offset, Format::zero, Format::sub_bytes, Format::scale_bytes,
                      typename Format::Levels>;

template <class Body>
inline void for_quads(Body body) {
  [&]<int... Q>(std::integer_sequence<int, Q...>) { (body(Constant<Q>{}), ...); }(std::make_integer_sequence<int, 8>{});
}

constexpr int log2(int n) { return n <= 1 ? 0 : 1 + log2(n / 2); }

// out[t][r] (+)= row r of the panel · token t: few tokens, straight from the packed codes.
template <class P, int Tokens>
void dot_panel(const uint8_t* panel, int64_t chunks, const Quantized8& x, int64_t token, float* out, int64_t out_stride,
               bool add) {
  const int64_t groups32 = x.n_cols / kGroup, group_bytes = P::group_bytes(chunks);
  const int8_t* code[Tokens];
  const float *scale_x[Tokens], *sum_x[Tokens];
  const int32_t* minus2[Tokens];
  for (int t = 0; t < Tokens; ++t) {
    code[t] = x.code + (token + t) * x.n_cols;
    scale_x[t] = x.scale + (token + t) * groups32;
    sum_x[t] = x.sum32 + (token + t) * groups32;
    minus2[t] = x.minus2 + (token + t) * groups32;
  }
  for (int row = 0; row < kPanelRows; row += kLanes) {
    F total[Tokens];
    for (int t = 0; t < Tokens; ++t) total[t] = set1(0.0f);
    const uint8_t* group = panel;
    for (int64_t g = 0; g < groups32; g += chunks, group += group_bytes) {
      if (row == 0) fetch_ahead(group, group_bytes);
      F part[Tokens];  // of this group, without its scale
      float inputs[Tokens] = {};
      for (int t = 0; t < Tokens; ++t) part[t] = set1(0.0f);
      const auto levels = P::Levels::of(group, row);
      const uint8_t* chunk = group + P::header;
      for (int64_t g32 = g; g32 < g + chunks; ++g32, chunk += P::chunk_bytes) {
        I sum[Tokens], above[Tokens];  // of odd quads that are raised
        for (int t = 0; t < Tokens; ++t) {
          above[t] = zero_int();
          if constexpr (P::has_offset || P::zero == 0) sum[t] = zero_int();
          else if constexpr (P::zero == 1) sum[t] = set1(minus2[t][g32] / 2);
          else sum[t] = shift_left<log2(P::zero / 2)>(set1(minus2[t][g32]));
        }
        for_quads([&](auto q) {
          constexpr bool is_raised = P::raised > 0 && q.value % 2 != 0;
          Quads w;
          if constexpr (is_raised) w = P::template raised_quad<q.value>(chunk, row);
          else w = levels(P::template quad<q.value>(chunk, row));
          I* const to = is_raised ? above : sum;
          for (int t = 0; t < Tokens; ++t)
            to[t] = dot_quads<P::is_signed>(to[t], w, repeat_quad(code[t] + g32 * kGroup + 4 * q.value));
        });
        for (int t = 0; t < Tokens; ++t) {
          if constexpr (P::raised > 0) sum[t] = shift_left<P::raised>(sum[t]) + above[t];
          part[t] = fma(to_float(sum[t]), set1(scale_x[t][g32]), part[t]);
          if constexpr (P::has_offset) inputs[t] += sum_x[t][g32];
        }
      }
      const F scale = P::scales(group, row) * set1(1.0f / (1 << P::raised));
      for (int t = 0; t < Tokens; ++t) {
        total[t] = fma(part[t], scale, total[t]);
        if constexpr (P::has_offset) total[t] = fma(P::offsets(group, row), set1(inputs[t]), total[t]);
      }
    }
    for (int t = 0; t < Tokens; ++t) {
      float* to = out + t * out_stride + row;
      store(to, add ? load(to) + total[t] : total[t]);
    }
  }
}

template <class P>
void dot_panels(const uint8_t* panels, int64_t n_panels, int64_t chunks, const Quantized8& x, int64_t n_tokens,
                float* out, int64_t out_stride, bool add) {
  const int64_t panel_bytes = x.n_cols / (32 * chunks) * P::group_bytes(chunks);
  for (int64_t p = 0; p < n_panels; ++p, panels += panel_bytes, out += kPanelRows) {
    int64_t t = 0;
    const auto take = [&](auto tokens) {
      for (; t + tokens.value <= n_tokens; t += tokens.value)
        dot_panel<P, tokens.value>(panels, chunks, x, t, out + t * out_stride, out_stride, add);
    };
    if constexpr (kLanes == 16) take(Constant<8>{});  // 16 accumulators: more than other sets have registers for
    take(Constant<4>{});
    take(Constant<2>{});
    take(Constant<1>{});
  }
}

// Columns k0 .. k0 + n - 1 of a panel into rows row0 .. row0 + 15 of a tile.
template <class P>
void unpack_panel(const uint8_t* panel, int64_t chunks, int row0, int64_t k0, int64_t n, const Tile& tile) {
  const uint8_t* group = panel + k0 / (32 * chunks) * P::group_bytes(chunks);
  uint8_t* code_to = tile.code + 4 * row0;
  float *scale_to = tile.scale + row0, *offset_to = tile.offset + row0;
  for (int64_t k = 0; k < n; k += 32 * chunks, group += P::group_bytes(chunks)) {
    fetch_ahead(group, P::group_bytes(chunks));
    const uint8_t* chunk = group + P::header;
    for (int64_t c = 0; c < chunks; ++c, chunk += P::chunk_bytes) {
      for (int row = 0; row < kPanelRows; row += kLanes) {
        const auto levels = P::Levels::of(group, row);
        store(scale_to + row, P::scales(group, row));
        store(offset_to + row, P::offsets(group, row));
        for_quads([&](auto q) {
          store_quads(code_to + 4 * (q.value * kRowTile + row), levels(P::template quad<q.value>(chunk, row)));
        });
      }
      code_to += 32 * kRowTile;
      scale_to += kRowTile;
      offset_to += kRowTile;
    }
  }
}

// As dequantize_row, bit for bit.
template <class Format>
void dequantize_lane(const uint8_t* data, int64_t n_cols, int64_t row, int64_t k0, int64_t n, float* out) {
  using P = PanelOf<Format>;
  const int lane = static_cast<int>(row % kPanelRows);
  const uint8_t* group = data + (row / kPanelRows * n_cols + k0) / Format::elements * kPanelRows * Format::bytes;
  for (; n > 0; n -= Format::elements, group += kPanelRows * Format::bytes) {
    const uint8_t* const number = group + Format::scale_bytes * lane;
    const float scale = read_scale<Format::scale_bytes>(number);
    const uint8_t* chunk = group + P::header;
    for (int c = 0; c < Format::elements / 32; ++c, chunk += P::chunk_bytes, out += 32) {
      for (int i = 0; i < 32; ++i) {
        int level = P::code(chunk, lane, i);
        if constexpr (P::Levels::indexed) level = P::Levels::level(number, level);
        else level -= P::stored_zero;
        const float product = scale * static_cast<float>(level);
        if constexpr (Format::has_offset) out[i] = product + half_at(group + 32 + 2 * lane);
        else out[i] = product;
      }
    }
  }
}

// One group of 16 rows, `row_bytes` apart, into panel order.
template <class Format>
void pack_group(const uint8_t* block, int64_t row_bytes, uint8_t* group) {
  using P = PanelOf<Format>;
  static_assert(P::group_bytes(Format::elements / 32) == kPanelRows * Format::bytes);
  for (int r = 0; r < kPanelRows; ++r) {
    const uint8_t* from = block + r * row_bytes;
    std::memcpy(group + Format::scale_bytes * r, from + Format::scale_at, Format::scale_bytes);
    if constexpr (Format::has_offset && Format::scale_bytes == 2)
      std::memcpy(group + 32 + 2 * r, from + Format::scale_at + 2, 2);
    if constexpr (Format::sub_bytes > 0) {
      uint8_t sub[Format::sub_bytes];
      Format::sub_scales(from, sub);
      for (int i = 0; i < Format::sub_bytes; ++i) group[P::numbers + kPanelRows * i + r] = sub[i];
    }
  }
  uint8_t* plane = group + P::header;
  for (int c = 0; c < Format::elements / 32; ++c) {
    uint8_t quads[8][64];
    for (int r = 0; r < kPanelRows; ++r) {
      uint8_t code[32];
      store(code, stored_codes<Format>(block + r * row_bytes, c));
      for (int q = 0; q < 8; ++q) std::memcpy(quads[q] + 4 * r, code + 4 * q, 4);
    }
    constexpr int per_vector = 8 / P::low;
    for (int v = 0; v < P::low; ++v, plane += 64) {
      for (int i = 0; i < 64; ++i) {
        int byte = P::flip ? quads[v][i] ^ 0x80 : 0;
        if constexpr (!P::flip) {
          for (int f = 0; f < per_vector; ++f)
            byte |= (quads[per_vector * v + f][i] & ((1 << P::low) - 1)) << (P::low * f);
        }
        plane[i] = static_cast<uint8_t>(byte);
      }
    }
    for (int v = 0; v < P::high; ++v, plane += 64) {
      constexpr int per_high = P::high > 0 ? 8 / P::high : 0;
      for (int i = 0; i < 64; ++i) {
        int byte = 0;
        for (int f = 0; f < per_high; ++f) byte |= quads[per_high * v + f][i] >> P::low << (P::high * f);
        plane[i] = static_cast<uint8_t>(byte);
      }
    }
  }
}

template <class Format>
void pack_panel(const uint8_t* rows, int64_t n_cols, uint8_t* out) {
  const int64_t n_groups = n_cols / Format::elements, row_bytes = n_groups * Format::bytes;
  for (int64_t g = 0; g < n_groups; ++g)
    pack_group<Format>(rows + g * Format::bytes, row_bytes, out + g * kPanelRows * Format::bytes);
}
