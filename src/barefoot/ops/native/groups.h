// Groups of weights on the levels of a grid: which parameters fit them, and which codes. What is computed, and in which
// order, stands in barefoot/ops/grids.py and rounding.py; results are the same bits.
#pragma once

constexpr int kRunningSums = 16;  // of grids.row_sums, whatever the width of a vector
constexpr int kSumParts = kRunningSums / kLanes;

inline F magnitude(F x) { return max(x, set1(0.0f) - x); }

inline F to_f16(F x) {
  uint8_t half[2 * kLanes];
  store_half(half, min(max(x, set1(-65504.0f)), set1(65504.0f)));
  return load_half(half) + set1(0.0f);
}

inline F inverse(F step) {
  const F zero = set1(0.0f);
  return where_less(zero, magnitude(step), set1(1.0f) / step, zero);
}

inline F ratio_or_zero(F a, F b) {
  const F zero = set1(0.0f);
  return where_less(zero, b, a / b, zero);
}

// The nearest level to a multiple of the scale: its value, and its rank among the levels.
struct EvenLevels {
  static constexpr bool kRanksAreCodes = true;
  F first, last;
  explicit EvenLevels(const Levels& levels)
      : first(set1(levels.values[0])), last(set1(levels.values[levels.n - 1])) {}
  F level(F ratio) const { return round_nearest(min(max(ratio, first), last)); }
  F rank(F ratio) const { return level(ratio) - first; }
  F level_of(F rank) const { return rank + first; }
};

struct TableLevels {
  static constexpr bool kRanksAreCodes = false;
  const float *values, *bounds;
  const uint8_t* codes;
  int64_t n;
  explicit TableLevels(const Levels& levels)
      : values(levels.values), bounds(levels.bounds), codes(levels.codes), n(levels.n) {}
  F level(F ratio) const {
    F found = set1(values[0]);
    for (int64_t i = 0; i + 1 < n; ++i) found = where_less(set1(bounds[i]), ratio, set1(values[i + 1]), found);
    return found;
  }
  F rank(F ratio) const {
    F found = set1(0.0f);
    for (int64_t i = 0; i + 1 < n; ++i)
      found = where_less(set1(bounds[i]), ratio, set1(static_cast<float>(i + 1)), found);
    return found;
  }
  F level_of(F rank) const {
    float each[kLanes];
    store(each, rank);
    for (float& one : each) one = values[static_cast<int>(one)];
    return load(each);
  }
};

template <class LevelKind>
inline void store_codes(const LevelKind& kind, F ranks, uint8_t* codes) {
  store_bytes(codes, ranks);
  if constexpr (!LevelKind::kRanksAreCodes)
    for (int j = 0; j < kLanes; ++j) codes[j] = kind.codes[codes[j]];
}

// Parameters of kLanes groups, one in each lane.
struct BatchParams {
  F scale, minimum;
};

// kLanes groups that lie one after the other; where there are fewer, the last one stands for those that are missing.
class Batch {
 public:
  Batch(const RoundingArgs& args, int64_t first, const float* importance = nullptr, bool importance_of_row = false)
      : args_(args), first_(first), importance_(importance), importance_of_row_(importance_of_row) {
    const int64_t left = args.n_groups() - first;
    n_ = left < kLanes ? static_cast<int>(left) : kLanes;
  }

  int n() const { return n_; }
  int64_t first() const { return first_; }
  int64_t group() const { return args_.levels.group; }
  const float* x(int g) const { return args_.x + at(g) * group(); }
  F importance(int g, int64_t i) const {
    if (!importance_) return set1(1.0f);
    const int64_t of = importance_of_row_ ? at(g) : at(g) % (args_.n_cols / group());
    return load(importance_ + of * group() + i);
  }

  // For each group the sum, or the largest, of what term(g, i) returns for its vectors; the order is row_sums'.
  template <class Term>
  F sums(Term term) const {
    return gathered(term, [](F a, F b) { return a + b; }, set1(0.0f));
  }
  template <class Term>
  F largest(Term term) const {
    return gathered(term, [](F a, F b) { return max(a, b); }, set1(-INFINITY));
  }

 private:
  int64_t at(int g) const { return first_ + (g < n_ ? g : n_ - 1); }

  template <class Term, class Join>
  F gathered(Term term, Join join, F start) const {
    alignas(64) float rows[kLanes * kLanes], columns[kLanes * kLanes];
    for (int g = 0; g < kLanes; ++g) {
      F parts[kSumParts];
      for (F& part : parts) part = start;
      for (int64_t i = 0; i < group(); i += kRunningSums) {
        BAREFOOT_UNROLL
        for (int part = 0; part < kSumParts; ++part) parts[part] = join(parts[part], term(g, i + part * kLanes));
      }
      for (int part = 1; part < kSumParts; ++part) parts[0] = join(parts[0], parts[part]);
      store(rows + g * kLanes, parts[0]);
    }
    transpose_block(rows, kLanes, columns, kLanes);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i)
        store(columns + i * kLanes, join(load(columns + i * kLanes), load(columns + (i + half) * kLanes)));
    return load(columns);
  }

  const RoundingArgs& args_;
  int64_t first_;
  const float* importance_;
  bool importance_of_row_;
  int n_;
};

// What a grid does with the groups of a batch.
template <class LevelKind>
class Grouping {
 public:
  explicit Grouping(const Levels& levels) : levels_(levels), kind_(levels) {}

  const LevelKind& kind() const { return kind_; }

  // Weighted squared errors of what parameters give.
  F error(const Batch& batch, const BatchParams& params) const {
    const Lanes lanes(params);
    return batch.sums([&](int g, int64_t i) {
      const F x = load(batch.x(g) + i), off = x - lanes.value(g, kind_.level(lanes.ratio(g, x)));
      return batch.importance(g, i) * (off * off);
    });
  }

  // As Grid.plain.
  BatchParams plain(const Batch& batch) const {
    if (levels_.rule == RangeRule::ternary) return {ternary_scale(batch), set1(0.0f)};
    auto [low, high] = range(batch);
    if (levels_.rule == RangeRule::two_means) two_means(batch, low, high);
    return spanning(low, high);
  }

  // As rounding.least_error.
  BatchParams least_error(const Batch& batch, const RangeSearch& search) const {
    const std::pair<F, F> ends = range(batch);
    const F zero = set1(0.0f);
    BatchParams best{zero, zero};
    F least = set1(INFINITY), best_low = zero, best_high = zero;  // the error, and by what the ends are multiplied
    const auto offer = [&](BatchParams params, F of_low, F of_high) {
      const F its = error(batch, params);
      best.scale = where_less(its, least, params.scale, best.scale);
      best.minimum = where_less(its, least, params.minimum, best.minimum);
      best_low = where_less(its, least, of_low, best_low);
      best_high = where_less(its, least, of_high, best_high);
      least = where_less(its, least, its, least);
    };
    const auto reach = [&](F of_low, F of_high) {
      offer(spanning(ends.first * of_low, ends.second * of_high), of_low, of_high);
    };
    for (int64_t i = 0; i < search.n_shrinks; ++i) reach(set1(search.shrinks[i]), set1(search.shrinks[i]));
    const F from_low = best_low, same_high = best_high;
    for (int64_t i = 0; i < search.n_steps; ++i) reach(from_low + set1(search.steps[i]), same_high);
    const F same_low = best_low, from_high = best_high;
    for (int64_t i = 0; i < search.n_steps; ++i) reach(same_low, from_high + set1(search.steps[i]));
    for (int i = 0; i < search.n_refits; ++i) offer(refit(batch, best), best_low, best_high);
    return best;
  }

  // Of the g-th group.
  void codes(const Batch& batch, const BatchParams& params, int g, uint8_t* codes) const {
    const Lanes lanes(params);
    const float* x = batch.x(g);
    for (int64_t i = 0; i < levels_.group; i += kLanes)
      store_codes(kind_, kind_.rank(lanes.ratio(g, load(x + i))), codes + i);
  }

 private:
  // Parameters as numbers, to be taken group by group.
  struct Lanes {
    alignas(64) float scale[kLanes], inverted[kLanes], minimum[kLanes];
    explicit Lanes(const BatchParams& params) {
      store(scale, params.scale);
      store(inverted, inverse(params.scale));
      store(minimum, params.minimum);
    }
    F ratio(int g, F x) const { return (x - set1(minimum[g])) * set1(inverted[g]); }
    F value(int g, F level) const { return set1(scale[g]) * level + set1(minimum[g]); }
  };

  static std::pair<F, F> range(const Batch& batch) {
    const F zero = set1(0.0f);
    const F below = batch.largest([&](int g, int64_t i) { return zero - load(batch.x(g) + i); });
    return {zero - below, batch.largest([&](int g, int64_t i) { return load(batch.x(g) + i); })};
  }

  BatchParams spanning(F low, F high) const {
    const F zero = set1(0.0f), first = set1(levels_.values[0]), last = set1(levels_.values[levels_.n - 1]);
    if (levels_.has_minimum) {
      const F minimum = to_f16(low);
      return {to_f16((high - minimum) / last), minimum};
    }
    if (levels_.even) return {to_f16(where_less(high, zero - low, low, high) / first), zero};
    return {to_f16(max(max(high, zero) / last, min(low, zero) / first)), zero};
  }

  // As Grid.refit, of the codes that ``from`` gives.
  BatchParams refit(const Batch& batch, const BatchParams& from) const {
    const Lanes lanes(from);
    const auto x = [&](int g, int64_t i) { return load(batch.x(g) + i); };
    const auto level = [&](int g, int64_t i) { return kind_.level(lanes.ratio(g, x(g, i))); };
    const auto weight = [&](int g, int64_t i) { return batch.importance(g, i); };
    if (!levels_.has_minimum) {
      const F with_x = batch.sums([&](int g, int64_t i) { return weight(g, i) * level(g, i) * x(g, i); });
      const F with_q = batch.sums([&](int g, int64_t i) { return weight(g, i) * level(g, i) * level(g, i); });
      return {to_f16(ratio_or_zero(with_x, with_q)), set1(0.0f)};
    }
    const F total = max(batch.sums(weight), set1(1e-30f));
    const F mean_q = batch.sums([&](int g, int64_t i) { return weight(g, i) * level(g, i); }) / total;
    const F mean_x = batch.sums([&](int g, int64_t i) { return weight(g, i) * x(g, i); }) / total;
    alignas(64) float means_q[kLanes], means_x[kLanes];
    store(means_q, mean_q);
    store(means_x, mean_x);
    const auto above = [&](int g, int64_t i) { return level(g, i) - set1(means_q[g]); };
    const F products = batch.sums(
        [&](int g, int64_t i) { return weight(g, i) * above(g, i) * (x(g, i) - set1(means_x[g])); });
    const F squares = batch.sums([&](int g, int64_t i) { return weight(g, i) * above(g, i) * above(g, i); });
    const F scale = to_f16(ratio_or_zero(products, squares));
    return {scale, to_f16(mean_x - scale * mean_q)};
  }

  F ternary_scale(const Batch& batch) const {
    const F zero = set1(0.0f), one = set1(1.0f);
    const auto size = [&](int g, int64_t i) { return magnitude(load(batch.x(g) + i)); };
    alignas(64) float thresholds[kLanes];
    store(thresholds, set1(0.7f) * (batch.sums(size) / set1(static_cast<float>(levels_.group))));
    const auto kept = [&](int g, F x, F yes) { return where_less(set1(thresholds[g]), x, yes, zero); };
    const F total = batch.sums([&](int g, int64_t i) { return kept(g, size(g, i), size(g, i)); });
    return to_f16(total / max(batch.sums([&](int g, int64_t i) { return kept(g, size(g, i), one); }), one));
  }

  void two_means(const Batch& batch, F& low, F& high) const {
    const F zero = set1(0.0f), one = set1(1.0f), n = set1(static_cast<float>(levels_.group));
    for (int step = 0; step < 8; ++step) {
      alignas(64) float middles[kLanes];
      store(middles, (low + high) * set1(0.5f));
      const auto sum = [&](auto choose) {
        return batch.sums([&](int g, int64_t i) { return choose(set1(middles[g]), load(batch.x(g) + i)); });
      };
      const F above = sum([&](F middle, F x) { return where_less(middle, x, x, zero); });
      const F below = sum([&](F middle, F x) { return where_less(middle, x, zero, x); });
      const F n_above = sum([&](F middle, F x) { return where_less(middle, x, one, zero); });
      high = where_less(zero, n_above, above / n_above, high);
      low = below / max(n - n_above, one);
    }
  }

  const Levels& levels_;
  LevelKind kind_;
};

// Codes of 32 elements as payload bytes: payload.pack_chunks. Eight codes are a number of 64 bits.
inline void pack_chunk(const uint8_t* codes, int bits, uint8_t* out) {
  constexpr uint64_t each = 0x0101010101010101u;
  const auto eight = [&](int i, int shift, int mask) {  // the bits of codes 8 i .. 8 i + 7 that mask keeps, shifted down
    uint64_t some;
    std::memcpy(&some, codes + 8 * i, 8);
    return some >> shift & each * static_cast<uint64_t>(mask);
  };
  const auto plane = [&](int shift, uint8_t* to) {  // one bit of each
    for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(eight(i, shift, 1) * 0x0102040810204080u >> 56);
  };
  const auto quarters = [&](int shift, uint8_t* to) {
    const uint64_t pairs = eight(0, shift, 3) | eight(1, shift, 3) << 2 | eight(2, shift, 3) << 4 | eight(3, shift, 3) << 6;
    std::memcpy(to, &pairs, 8);
  };
  const auto halves = [&](uint8_t* to) {
    for (int i = 0; i < 2; ++i) {
      const uint64_t nibbles = eight(i, 0, 15) | eight(2 + i, 0, 15) << 4;
      std::memcpy(to + 8 * i, &nibbles, 8);
    }
  };
  switch (bits) {
    case 8: std::memcpy(out, codes, 32); break;
    case 7: halves(out), quarters(4, out + 16), plane(6, out + 24); break;
    case 6: halves(out), quarters(4, out + 16); break;
    case 5: plane(4, out), halves(out + 4); break;
    case 4: halves(out); break;
    case 3: quarters(0, out), plane(2, out + 8); break;
    case 2: quarters(0, out); break;
    default: plane(0, out);
  }
}

template <class Body>
inline void with_levels(const Levels& levels, Body body) {
  if (levels.even) return body(Grouping<EvenLevels>(levels));
  body(Grouping<TableLevels>(levels));
}

// Calls body(batch) for all groups, shared among the threads.
template <class Body>
inline void each_batch(const RoundingArgs& args, const float* importance, bool importance_of_row, Body body) {
  const int64_t n_batches = (args.n_groups() + kLanes - 1) / kLanes;
  parallel_for(n_batches, args.n_rows * args.n_cols < kParallel ? 1 : n_threads(), [&](int64_t i, int) {
    body(Batch(args, i * kLanes, importance, importance_of_row));
  });
}

inline void fit_groups(const RoundingArgs& args, const float* importance, bool importance_of_row,
                       const RangeSearch& search, float* params) {
  with_levels(args.levels, [&](auto grouping) {
    each_batch(args, importance, importance_of_row, [&](const Batch& batch) {
      const BatchParams best = grouping.least_error(batch, search);
      float scales[kLanes], minimums[kLanes];
      store(scales, best.scale);
      store(minimums, best.minimum);
      float* to = params + batch.first() * args.levels.n_params();
      for (int g = 0; g < batch.n(); ++g) {
        *to++ = scales[g];
        if (args.levels.has_minimum) *to++ = minimums[g];
      }
    });
  });
}

// Parameters (groups, p) of a batch.
inline BatchParams load_params(const Batch& batch, const Levels& levels, const float* params) {
  float scales[kLanes] = {}, minimums[kLanes] = {};
  const float* from = params + batch.first() * levels.n_params();
  for (int g = 0; g < batch.n(); ++g) {
    scales[g] = *from++;
    if (levels.has_minimum) minimums[g] = *from++;
  }
  return {load(scales), load(minimums)};
}

inline void group_errors(const RoundingArgs& args, const float* params, const float* importance,
                         bool importance_of_row, float* errors) {
  with_levels(args.levels, [&](auto grouping) {
    each_batch(args, importance, importance_of_row, [&](const Batch& batch) {
      float found[kLanes];
      store(found, grouping.error(batch, load_params(batch, args.levels, params)));
      std::memcpy(errors + batch.first(), found, batch.n() * sizeof(float));
    });
  });
}

inline void round_groups(const RoundingArgs& args, const float* params, uint8_t* codes) {
  with_levels(args.levels, [&](auto grouping) {
    each_batch(args, nullptr, false, [&](const Batch& batch) {
      const BatchParams given = load_params(batch, args.levels, params);
      for (int g = 0; g < batch.n(); ++g)
        grouping.codes(batch, given, g, codes + (batch.first() + g) * batch.group());
    });
  });
}

// Blocks of an f16 scale (and minimum) and chunks of codes, as blocks.encode; false where x is not finite.
inline bool encode_groups(const RoundingArgs& args, int bits, bool is_signed, uint8_t* out) {
  const int64_t group = args.levels.group, header = 2 * args.levels.n_params();
  const int64_t block_bytes = header + group * bits / 8;
  std::atomic<bool> finite{true};
  with_levels(args.levels, [&](auto grouping) {
    each_batch(args, nullptr, false, [&](const Batch& batch) {
      const F zeros = batch.sums([&](int g, int64_t i) { return load(batch.x(g) + i) * set1(0.0f); });
      if (!(reduce_add(zeros) == 0)) return finite.store(false, std::memory_order_relaxed);
      const BatchParams params = grouping.plain(batch);
      uint8_t scales[2 * kLanes], minimums[2 * kLanes], codes[kMostEncoded];
      store_half(scales, params.scale);
      store_half(minimums, params.minimum);
      for (int g = 0; g < batch.n(); ++g) {
        uint8_t* to = out + (batch.first() + g) * block_bytes;
        std::memcpy(to, scales + 2 * g, 2);
        if (args.levels.has_minimum) std::memcpy(to + 2, minimums + 2 * g, 2);
        grouping.codes(batch, params, g, codes);
        if (is_signed)
          for (int64_t i = 0; i < group; ++i) codes[i] ^= 0x80;
        for (int64_t i = 0; i < group; i += 32) pack_chunk(codes + i, bits, to + header + i / 8 * bits);
      }
    });
  });
  return finite.load();
}
