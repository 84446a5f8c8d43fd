// Columns rounded one after the other, each error passed on to the columns behind it: rounding.feedback_round.
#pragma once

// One lane for each of kLanes rows: columns lie one after the other, and a column's parameters are vectors.
template <class LevelKind>
inline void feedback_panel(const FeedbackArgs& args, const LevelKind& kind, int64_t first) {
  const int64_t n = args.n_cols, n_params = args.levels.n_params();
  const int64_t rows = args.n_rows - first < kLanes ? args.n_rows - first : kLanes;
  alignas(64) float targets[kMostFeedback * kLanes], scales[kLanes] = {}, minimums[kLanes] = {}, own[kLanes] = {};
  for (int64_t k = 0; k < n; ++k)
    for (int64_t r = 0; r < kLanes; ++r) targets[k * kLanes + r] = r < rows ? args.targets[(first + r) * n + k] : 0.0f;
  const F zero = set1(0.0f);
  F scale = zero, inverted = zero, minimum = zero;
  for (int64_t k = 0; k < n; ++k) {
    if (k == 0 || args.groups[k] != args.groups[k - 1]) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* params = args.params + ((first + r) * args.n_groups + args.groups[k]) * n_params;
        scales[r] = params[0];
        if (args.levels.has_minimum) minimums[r] = params[1];
      }
      scale = load(scales);
      minimum = load(minimums);
      inverted = inverse(scale);
    }
    for (int64_t r = 0; r < rows; ++r) own[r] = args.weights[(first + r) * n + k];
    float* at = targets + k * kLanes;
    const F rank = kind.rank((load(at) - minimum) * inverted);
    const F error = load(own) - (scale * kind.level_of(rank) + minimum);
    store(at, error);
    uint8_t codes[kLanes];
    store_codes(kind, rank, codes);
    for (int64_t r = 0; r < rows; ++r) args.codes[(first + r) * n + k] = codes[r];
    const float* mixing = args.mixing + k * n;
    for (int64_t j = k + 1; j < n; ++j) {
      float* later = targets + j * kLanes;
      store(later, load(later) + error * set1(mixing[j]));
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < n; ++k) args.targets[(first + r) * n + k] = targets[k * kLanes + r];
}

inline void feedback_round(const FeedbackArgs& args) {
  const int64_t n_panels = (args.n_rows + kLanes - 1) / kLanes;
  with_levels(args.levels, [&](auto grouping) {
    parallel_for(n_panels, args.n_rows * args.n_cols < kParallel ? 1 : n_threads(),
                 [&](int64_t panel, int) { feedback_panel(args, grouping.kind(), panel * kLanes); });
  });
}
