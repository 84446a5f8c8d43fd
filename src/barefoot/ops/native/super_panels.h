// Panels of the formats whose scales have scales. K-quants: w = d * sub_scale * (code - zero), or less dmin *
// sub_minimum. Bilevel groups: w = d * sub_scale * (code - sub_zero).
#pragma once

template <class Format>
struct SuperPanel : PanelOf<Format> {
  using Base = PanelOf<Format>;
  static constexpr int chunks = Format::elements / 32;
  static constexpr int parts = 32 / Format::group;  // sub-scales of a chunk
  static constexpr int64_t group_bytes = Base::group_bytes(chunks);
  static constexpr int kUnpacked = 2 * 16 * kPanelRows;

  // The sub-scales of a group, one byte each: number j of row r is byte 16 j + r; minimums come after the scales.
  // `room` has kUnpacked bytes.
  static const uint8_t* sub_scales(const uint8_t* group, uint8_t* room) {
    constexpr int step = 4 * kLanes, quarter = 4 * kPanelRows;
    const uint8_t* packed = group + Base::numbers;
    if constexpr (Format::sub_bytes == 12) {
      for (int i = 0; i < quarter; i += step) {
        const Quads high = load_quads(packed + 2 * quarter + i);
        const auto six = [&](auto k) {  // numbers 4 k .. 4 k + 3
          const Quads low = field<4 * (k.value / 2)>(load_quads(packed + quarter * (k.value % 2) + i), 15);
          store_quads(room + quarter * k.value + i, merge(low, field<2 * k.value - 4>(high, 0x30)));
        };
        six(Constant<0>{});
        six(Constant<1>{});
        six(Constant<2>{});
        six(Constant<3>{});
      }
      return room;
    } else if constexpr (Format::has_offset) {
      for (int i = 0; i < 4 * quarter; i += step) {
        const Quads both = load_quads(packed + i);
        store_quads(room + i, field<0>(both, 15));
        store_quads(room + 4 * quarter + i, field<4>(both, 15));
      }
      return room;
    } else return packed;
  }

  static F sub_scale(const uint8_t* sub_scales, int j, int row) {
    const F scale = to_float(widen_bytes(sub_scales + kPanelRows * j + row));
    if constexpr (Format::sub_zero != 0) return scale - set1(static_cast<float>(Format::sub_zero));
    else return scale;
  }
  // What the offset of sub-block j is a multiple of, and `offset_scales` the factor: minimums, or the scales themselves
  // for the zero point.
  static F sub_offset(const uint8_t* sub_scales, int j, int row) {
    return sub_scale(sub_scales, Base::has_offset ? parts * chunks + j : j, row);
  }
  static F offset_scales(const uint8_t* group, int row) {
    if constexpr (Base::has_offset) return set1(0.0f) - load_half(group + 32 + 2 * row);
    else return set1(-static_cast<float>(Base::zero)) * Base::scales(group, row);
  }

  // Of one row: the scale of sub-block j, and what its offset is.
  static float lane_scale(const uint8_t* group, const uint8_t* sub_scales, int lane, int j) {
    return half_at(group + 2 * lane) * lane_number(sub_scales, lane, j);
  }
  static float lane_offset(const uint8_t* group, const uint8_t* sub_scales, int lane, int j) {
    return -(half_at(group + 32 + 2 * lane) * lane_number(sub_scales, lane, parts * chunks + j));
  }

 private:
  static float lane_number(const uint8_t* sub_scales, int lane, int j) {
    return static_cast<float>(static_cast<int8_t>(sub_scales[kPanelRows * j + lane]) - Format::sub_zero);
  }
};

// Sub-scales are 5 bytes a row: the code of d, then the scale (low half) and zero point (high half) of each group.
template <class Format>
struct BilevelPanel : PanelOf<Format> {
  using Base = PanelOf<Format>;
  static constexpr int chunks = Format::elements / 32, parts = 32 / Format::group;
  static constexpr int64_t group_bytes = Base::group_bytes(chunks);
  static constexpr int n_groups = chunks * parts, kUnpacked = 2 * n_groups * kPanelRows;

  static const uint8_t* sub_scales(const uint8_t* group, uint8_t* room) {
    constexpr int half = n_groups * kPanelRows;
    for (int i = 0; i < half; i += 4 * kLanes) {
      const Quads both = load_quads(group + kPanelRows + i);
      store_quads(room + i, field<0>(both, 15));
      store_quads(room + half + i, field<4>(both, 15));
    }
    return room;
  }
  static F sub_scale(const uint8_t* sub_scales, int j, int row) {
    return to_float(widen_bytes(sub_scales + kPanelRows * j + row));
  }
  static F sub_offset(const uint8_t* sub_scales, int j, int row) {
    return sub_scale(sub_scales, j, row) * fma(set1(3.0f), sub_scale(sub_scales, n_groups + j, row), set1(8.0f));
  }
  static F scales(const uint8_t* group, int row) {
    uint16_t half[kLanes];
    for (int i = 0; i < kLanes; ++i) half[i] = static_cast<uint16_t>(group[row + i] << 7);
    return load_half(half) * set1(1.0f / 256);
  }
  static F offset_scales(const uint8_t* group, int row) { return scales(group, row) * set1(-Format::zero_unit); }

  static float lane_scale(const uint8_t* group, const uint8_t* sub_scales, int lane, int j) {
    return Format::step(group[lane]) * static_cast<float>(sub_scales[kPanelRows * j + lane]);
  }
  static float lane_offset(const uint8_t* group, const uint8_t* sub_scales, int lane, int j) {
    const float zero = static_cast<float>(8 + 3 * sub_scales[kPanelRows * (n_groups + j) + lane]);
    return -(lane_scale(group, sub_scales, lane, j) * (Format::zero_unit * zero));
  }
};

template <class Format>
using SuperPanelOf = std::conditional_t<Format::scale_bytes != 0, SuperPanel<Format>, BilevelPanel<Format>>;

// Calls body(Q) for the quads of part `Part` of a chunk.
template <int Parts, int Part, class Body>
inline void for_part(Body body) {
  for_quads([&](auto q) {
    if constexpr (q.value / (8 / Parts) == Part) body(q);
  });
}

// As dot_panel. The sum of a sub-block times its sub-scale is exact in float32: at most 16 * 63 * 127 * 128 < 2^24.
template <class P, int Tokens>
void dot_super_panel(const uint8_t* panel, const Quantized8& x, int64_t token, float* out, int64_t out_stride,
                     bool add) {
  const int64_t groups32 = x.n_cols / kGroup;
  const int8_t* code[Tokens];
  const float *scale_x[Tokens], *sum_x[Tokens];
  for (int t = 0; t < Tokens; ++t) {
    code[t] = x.code + (token + t) * x.n_cols;
    scale_x[t] = x.scale + (token + t) * groups32;
    sum_x[t] = P::parts == 2 ? x.sum16 + (token + t) * groups32 * 2 : x.sum32 + (token + t) * groups32;
  }
  for (int row = 0; row < kPanelRows; row += kLanes) {
    F total[Tokens];
    for (int t = 0; t < Tokens; ++t) total[t] = set1(0.0f);
    const uint8_t* group = panel;
    for (int64_t g = 0; g < groups32; g += P::chunks, group += P::group_bytes) {
      if (row == 0) fetch_ahead(group, P::group_bytes);
      alignas(64) uint8_t room[P::kUnpacked];
      const uint8_t* sub_scales = P::sub_scales(group, room);
      const uint8_t* chunk = group + P::header;
      F products[Tokens], offsets[Tokens];
      for (int t = 0; t < Tokens; ++t) products[t] = offsets[t] = set1(0.0f);
      for (int c = 0; c < P::chunks; ++c, chunk += P::chunk_bytes) {
        F scaled[Tokens];
        const auto take = [&](auto part) {
          const int j = P::parts * c + part.value;
          I sum[Tokens];
          for (int t = 0; t < Tokens; ++t) sum[t] = zero_int();
          for_part<P::parts, part.value>([&](auto q) {
            const Quads w = P::template quad<q.value>(chunk, row);
            for (int t = 0; t < Tokens; ++t)
              sum[t] = dot_quads<false>(sum[t], w, repeat_quad(code[t] + (g + c) * kGroup + 4 * q.value));
          });
          const F scale = P::sub_scale(sub_scales, j, row), offset = P::sub_offset(sub_scales, j, row);
          for (int t = 0; t < Tokens; ++t) {
            scaled[t] = part.value == 0 ? to_float(sum[t]) * scale : fma(to_float(sum[t]), scale, scaled[t]);
            offsets[t] = fma(offset, set1(sum_x[t][P::parts * g + j]), offsets[t]);
          }
        };
        take(Constant<0>{});
        if constexpr (P::parts == 2) take(Constant<1>{});
        for (int t = 0; t < Tokens; ++t) products[t] = fma(scaled[t], set1(scale_x[t][g + c]), products[t]);
      }
      for (int t = 0; t < Tokens; ++t) {
        total[t] = fma(products[t], P::scales(group, row), total[t]);
        total[t] = fma(offsets[t], P::offset_scales(group, row), total[t]);
      }
    }
    for (int t = 0; t < Tokens; ++t) {
      float* to = out + t * out_stride + row;
      store(to, add ? load(to) + total[t] : total[t]);
    }
  }
}

template <class P>
void dot_super_panels(const uint8_t* panels, int64_t n_panels, int64_t, const Quantized8& x, int64_t n_tokens,
                      float* out, int64_t out_stride, bool add) {
  const int64_t panel_bytes = x.n_cols / (32 * P::chunks) * P::group_bytes;
  for (int64_t p = 0; p < n_panels; ++p, panels += panel_bytes, out += kPanelRows) {
    int64_t t = 0;
    const auto take = [&](auto tokens) {
      for (; t + tokens.value <= n_tokens; t += tokens.value)
        dot_super_panel<P, tokens.value>(panels, x, t, out + t * out_stride, out_stride, add);
    };
    take(Constant<4>{});
    take(Constant<2>{});
    take(Constant<1>{});
  }
}

// As unpack_panel.
template <class P>
void unpack_super_panel(const uint8_t* panel, int64_t, int row0, int64_t k0, int64_t n, const Tile& tile) {
  const uint8_t* group = panel + k0 / (32 * P::chunks) * P::group_bytes;
  uint8_t* code_to = tile.code + 4 * row0;
  float *scale_to = tile.scale + row0, *offset_to = tile.offset + row0;
  for (int64_t k = 0; k < n; k += 32 * P::chunks, group += P::group_bytes) {
    alignas(64) uint8_t room[P::kUnpacked];
    const uint8_t* sub_scales = P::sub_scales(group, room);
    for (int j = 0; j < P::parts * P::chunks; ++j, scale_to += kRowTile, offset_to += kRowTile) {
      for (int row = 0; row < kPanelRows; row += kLanes) {
        store(scale_to + row, P::scales(group, row) * P::sub_scale(sub_scales, j, row));
        store(offset_to + row, P::offset_scales(group, row) * P::sub_offset(sub_scales, j, row));
      }
    }
    const uint8_t* chunk = group + P::header;
    for (int c = 0; c < P::chunks; ++c, chunk += P::chunk_bytes, code_to += 32 * kRowTile) {
      for (int row = 0; row < kPanelRows; row += kLanes) {
        for_quads([&](auto q) {
          store_quads(code_to + 4 * (q.value * kRowTile + row), P::template quad<q.value>(chunk, row));
        });
      }
    }
  }
}

// As dequantize_row, bit for bit.
template <class Format>
void dequantize_super_lane(const uint8_t* data, int64_t n_cols, int64_t row, int64_t k0, int64_t n, float* out) {
  using P = SuperPanelOf<Format>;
  const int lane = static_cast<int>(row % kPanelRows);
  const uint8_t* group = data + (row / kPanelRows * n_cols + k0) / Format::elements * P::group_bytes;
  for (; n > 0; n -= Format::elements, group += P::group_bytes) {
    alignas(64) uint8_t room[P::kUnpacked];
    const uint8_t* sub_scales = P::sub_scales(group, room);
    for (int j = 0; j < P::parts * P::chunks; ++j) {
      const float scale = P::lane_scale(group, sub_scales, lane, j);
      const uint8_t* chunk = group + P::header + j / P::parts * P::chunk_bytes;
      for (int i = 0; i < Format::group; ++i) {
        const int code = P::code(chunk, lane, j % P::parts * Format::group + i);
        const float product = scale * static_cast<float>(code - Format::zero);
        if constexpr (Format::has_offset) *out++ = product + P::lane_offset(group, sub_scales, lane, j);
        else *out++ = product;
      }
    }
  }
}
