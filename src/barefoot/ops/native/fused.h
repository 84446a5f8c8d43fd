// Norms, rotations, gates and the like: one pass over the data each.
#pragma once

// e^x to about 1 ulp; 0 below -87.3, infinity above 88.3, NaN stays.
inline F exp(F x) {
  const F low = set1(-87.3f), high = set1(88.3f);
  const F clamped = min(high, max(low, x));
  const F n = round_nearest(clamped * set1(1.44269504f));
  F r = fma(n, set1(-0.693359375f), clamped);  // ln 2 in two parts, the first exact in few bits
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.0f / 5040);
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float c : kTaylor) p = fma(p, r, set1(c));
  const F value = p * power_of_two(n);
  return where_less(high, x, set1(INFINITY), where_less(x, low, set1(0.0f), value));
}

// e^x for x <= 0, within 2^-21 of it where that is above 2^-24, and 0 from about 2^-126 down; NaN stays.
inline F exp_falling(F x) {
  const F scale = set1(1.44269504f), least = max(set1(-138.0f), x);
  const F n = round_nearest(least * scale), part = fma(least, scale, set1(0.0f) - n);
  F p = set1(1.5403530e-4f);  // (ln 2)^k / k!: 2^part to its sixth power, 1.2e-7 of it
  for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    p = fma(p, part, set1(c));
  return scale_down(p, n);
}

inline F tanh(F x) {
  const F square = x * x, ratio = set1(1.0f) - set1(2.0f) / (exp(x + x) + set1(1.0f));
  F series = set1(-1382.0f / 155925);  // where the ratio would be the difference of neighbours
  for (const float c : {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f}) series = fma(series, square, set1(c));
  return where_less(square, set1(0.16f), x * series, ratio);
}

// Apply to[i] = op(a[i], b[i]), the tail through padded copies.
template <class Op>
inline void map(const float* a, const float* b, float* to, int64_t n, Op op) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, op(load(a + i), load(b + i)));
  if (i < n) {
    float padded[kLanes];
    store(padded, op(load_first(a + i, n - i), load_first(b + i, n - i)));
    std::memcpy(to + i, padded, (n - i) * sizeof(float));
  }
}

// Split [0, n) into pieces for the threads when there is enough of it.
template <class Body>
inline void in_pieces(int64_t n, Body body) {
  const int64_t piece = kParallel / 2;
  if (n < kParallel) return body(int64_t{0}, n);
  parallel_for((n + piece - 1) / piece, n_threads(), [&](int64_t i, int) {
    body(i * piece, (i + 1) * piece < n ? (i + 1) * piece : n);
  });
}

inline void rmsnorm(const float* x, const float* weight, float eps, bool plus_one, int64_t n_rows, int64_t n,
                    float* out) {
  const auto one_row = [&](int64_t row, int) {
    const float* from = x + row * n;
    F squares = set1(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) squares = fma(load(from + i), load(from + i), squares);
    if (i < n) squares = fma(load_first(from + i, n - i), load_first(from + i, n - i), squares);
    const F factor = set1(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(n) + eps));
    const F shift = set1(plus_one ? 1.0f : 0.0f);
    map(from, weight, out + row * n, n, [&](F a, F w) { return a * factor * (w + shift); });
  };
  parallel_for(n_rows, n_rows * n < kParallel ? 1 : n_threads(), one_row);
}

// Pairs (a, b), half a head apart, to (a c - b s, a s + b c).
inline void rotate_halves(float* a, float* b, const float* c, const float* s, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F x = load(a + i), y = load(b + i), cosine = load(c + i), sine = load(s + i);
    store(a + i, x * cosine - y * sine);
    store(b + i, x * sine + y * cosine);
  }
  for (; i < half; ++i) {
    const float x = a[i], y = b[i];
    a[i] = x * c[i] - y * s[i];
    b[i] = x * s[i] + y * c[i];
  }
}

// The same of neighbours: n elements, cosines twice each, and sines with the sign of their part, (-s, s).
inline void rotate_neighbours(float* x, const float* c, const float* s, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F pairs = load(x + i);
    store(x + i, pairs * load(c + i) + swap_pairs(pairs) * load(s + i));
  }
  for (; i < n; i += 2) {
    const float a = x[i], b = x[i + 1];
    x[i] = a * c[i] + b * s[i];
    x[i + 1] = b * c[i + 1] + a * s[i + 1];
  }
}

inline void rope(float* x, int64_t n_tokens, int64_t n_heads, int64_t head_dim, const float* cos, const float* sin,
                 int64_t half, bool interleaved) {
  constexpr int64_t kBlock = 64;  // pairs whose cosines and sines are spread at a time, for all heads
  const auto one_token = [&](int64_t token, int) {
    const float *c = cos + token * half, *s = sin + token * half;
    float* const heads = x + token * n_heads * head_dim;
    for (int64_t h = 0; h < n_heads && !interleaved; ++h)
      rotate_halves(heads + h * head_dim, heads + h * head_dim + half, c, s, half);
    for (int64_t first = 0; first < half && interleaved; first += kBlock) {
      const int64_t n = half - first < kBlock ? half - first : kBlock;
      float spread_c[2 * kBlock], spread_s[2 * kBlock];
      for (int64_t i = 0; i < n; ++i) {
        spread_c[2 * i] = spread_c[2 * i + 1] = c[first + i];
        spread_s[2 * i] = -s[first + i];
        spread_s[2 * i + 1] = s[first + i];
      }
      for (int64_t h = 0; h < n_heads; ++h)
        rotate_neighbours(heads + h * head_dim + 2 * first, spread_c, spread_s, 2 * n);
    }
  };
  parallel_for(n_tokens, n_tokens * n_heads * head_dim < kParallel ? 1 : n_threads(), one_token);
}

inline void glu(const float* gate, const float* up, float* out, int64_t n, Activation activation) {
  const F one = set1(1.0f);
  in_pieces(n, [&](int64_t begin, int64_t end) {
    const float *g = gate + begin, *u = up + begin;
    if (activation == Activation::silu) {
      map(g, u, out + begin, end - begin, [&](F x, F y) { return x / (one + exp(set1(0.0f) - x)) * y; });
    } else {  // x / 2 * (1 + tanh(a)) = x / (1 + e^(-2 a)), a = sqrt(2 / pi) * (x + 0.044715 x^3)
      const F linear = set1(-1.5957691216f), cubic = set1(-1.5957691216f * 0.044715f);
      map(g, u, out + begin, end - begin, [&](F x, F y) {
        const F exponent = x * fma(cubic, x * x, linear);
        return x / (one + exp(exponent)) * y;
      });
    }
  });
}

inline void add(float* x, const float* y, int64_t n) {
  in_pieces(n, [&](int64_t begin, int64_t end) {
    map(x + begin, y + begin, x + begin, end - begin, [](F a, F b) { return a + b; });
  });
}
