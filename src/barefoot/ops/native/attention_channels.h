// Attention of one token over values by channel (kvblocks.py): each channel has a scale and a minimum for the positions of
// a group, so what is wanted of it is
//
//   sum of p[t] * (scale * code[t] + minimum) = scale * (sum of p[t] * code[t]) + minimum * (sum of p[t])
//
// with weights p. These are rounded to 16 bits, as terms are in attention_blocks.h, anew for each tile of a group.
#pragma once

template <int Bits>
struct ChannelValues final : ValueTiles {
  const ValueBlocks& blocks;
  const AttentionLayout& l;
  const AttentionScratch& s;
  const uint8_t* head;
  int64_t start, base = 0, n = 0;

  ChannelValues(const SegmentArgs& a, const AttentionLayout& layout, const AttentionScratch& scratch, int64_t h)
      : blocks(a.value_blocks), l(layout), s(scratch), start(a.value_start) {
    head = a.v + h * blocks.n_blocks * blocks.block_bytes();
  }

  const uint8_t* block(int64_t position) const { return head + position / blocks.group * blocks.block_bytes(); }
  const uint8_t* run(int64_t position) const {
    return block(position) + 4 * blocks.head_dim + position % blocks.group / kBlockRun * blocks.run_bytes();
  }

  void take(int64_t first, int64_t count) override {
    base = start + first, n = count;
    for (int64_t j = 0; j < n; j += kBlockRun) ask_for(run(base + j), run(base + j) + blocks.run_bytes());
    for (int64_t j = 0; j < n; j += blocks.group) ask_for(block(base + j), block(base + j) + 4 * blocks.head_dim);
  }

  // Positions base + [j, end), whole runs of one group.
  template <int Queries>
  void mix_part(int64_t i0, int64_t j, int64_t end) const {
    static constexpr uint16_t kOne = 0x3C00, kOnes[] = {kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne,
                                                        kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne};
    int16_t terms[Queries][kKeyTile];
    float step[Queries], total[Queries];
    round_terms<Queries>(s.score + i0 * kKeyTile + j, kKeyTile, end - j,
                         [&](int64_t) { return reinterpret_cast<const uint8_t*>(kOnes); }, 0, terms[0], kKeyTile, step,
                         total);
    const uint8_t *const scales = block(base + j), *const minimums = scales + 2 * blocks.head_dim;
    const uint8_t* const codes = run(base + j);
    for (int64_t c = 0; c < blocks.head_dim; c += 32)
      for (int64_t d = 0; d < 32; d += kLaneVectors * kLanes) {
        CodeSums<Queries> sum;
        for (int64_t t = j; t < end; t += kBlockRun)
          add_terms<Bits>(codes + (t - j) / kBlockRun * blocks.run_bytes() + c / 32 * Bits * 128 + 4 * d,
                          terms[0] + t - j, kKeyTile, sum);
        for (int v = 0; v < kLaneVectors; ++v) {
          const int64_t at = c + d + v * kLanes;
          const F scale = load_half(scales + 2 * at), minimum = load_half(minimums + 2 * at);
          for (int i = 0; i < Queries; ++i) {
            float* const to = s.sum + (i0 + i) * l.width + at;
            const F whole = fma(sum.whole(i, v) * set1(step[i]), scale, minimum * set1(total[i]));
            store(to, load(to) + whole);
          }
        }
      }
  }

  void mix() override {
    const int64_t whole = round_up(n, kBlockRun);
    for (int64_t j = 0; j < whole;) {
      const int64_t left = blocks.group - (base + j) % blocks.group, end = j + left < whole ? j + left : whole;
      query_blocks(l.sharing, [&](auto queries, int64_t i) { this->template mix_part<queries.value>(i, j, end); });
      j = end;
    }
  }
};

// 32 positions: out[j * width + c].
inline void decode_channel_values(const ValueBlocks& v, const uint8_t* head, int64_t position, float* out,
                                  int64_t width) {
  const uint8_t* const block = head + position / v.group * v.block_bytes();
  const uint8_t* run = block + 4 * v.head_dim + position % v.group / kBlockRun * v.run_bytes();
  for (int64_t c = 0; c < v.head_dim; c += 32) {
    const int64_t n = v.head_dim - c < 32 ? v.head_dim - c : 32;
    float scale[32], minimum[32];
    for (int64_t lane = 0; lane < n; ++lane) {
      scale[lane] = half_at(block + 2 * (c + lane));
      minimum[lane] = half_at(block + 2 * (v.head_dim + c + lane));
    }
    each_term(v.bits, run, kBlockRun, n, [&](int64_t j, auto code) {
      float* const to = out + j * width + c;
      for (int64_t lane = 0; lane < n; ++lane) to[lane] = scale[lane] * code(lane) + minimum[lane];
    });
    run += n * 4 * code_words(v.bits, kBlockRun);
  }
}
