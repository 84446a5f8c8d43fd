// Python bindings: every shape, dtype and size is checked here, so the kernels can trust their arguments.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "system.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace barefoot {

#define BAREFOOT_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels kernels; \
  }
BAREFOOT_DECLARE(portable)
#if defined(BAREFOOT_X86)
BAREFOOT_DECLARE(avx2)
BAREFOOT_DECLARE(avx512)
BAREFOOT_DECLARE(avx512_vnni)
#endif
#if defined(BAREFOOT_AMX)
BAREFOOT_DECLARE(amx)
#endif
#if defined(BAREFOOT_NEON)
BAREFOOT_DECLARE(neon)
#endif

namespace {

template <class T, class... Shape>
using Array = nb::ndarray<T, Shape..., nb::c_contig, nb::device::cpu>;
using Vector = Array<const float, nb::ndim<1>>;
using Matrix = Array<const float, nb::ndim<2>>;
using MatrixOut = Array<float, nb::ndim<2>>;
using RowsOut = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;  // with any distance between them
using Bytes = Array<const uint8_t>;
using BytesOut = Array<uint8_t>;
using KvBytes = Array<const uint8_t, nb::ndim<3>>;
using KvBytesOut = Array<uint8_t, nb::ndim<3>>;
using KvStore = Array<const uint8_t, nb::ndim<4>>;  // of several sequences
using KvStoreOut = Array<uint8_t, nb::ndim<4>>;

struct Isa {
  const char* name;
  const Kernels* kernels;
};

std::vector<Isa> usable_isas() {  // slowest first
  std::vector<Isa> found{{"portable", &portable::kernels}};
#if defined(BAREFOOT_X86) || defined(BAREFOOT_NEON)
  const CpuFeatures cpu = cpu_features();
#endif
#if defined(BAREFOOT_X86)
  if (cpu.avx2) found.push_back({"avx2", &avx2::kernels});
  if (cpu.avx512) found.push_back({"avx512", &avx512::kernels});
  if (cpu.avx512_vnni) found.push_back({"avx512-vnni", &avx512_vnni::kernels});
#endif
#if defined(BAREFOOT_AMX)
  if (cpu.amx) found.push_back({"amx", &amx::kernels});
#endif
#if defined(BAREFOOT_NEON)
  if (cpu.neon_dotprod) found.push_back({"neon", &neon::kernels});
#endif
  return found;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = usable_isas();
  return found;
}

Isa& chosen() {
  static Isa isa = isas().back();
  return isa;
}

const Kernels& kernels() { return *chosen().kernels; }

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

std::string text(int64_t n) { return std::to_string(n); }

void expect(bool condition, const char* what, int64_t expected, int64_t got) {
  if (!condition) refuse(std::string(what) + ": expected " + text(expected) + ", got " + text(got));
}

void expect_size(const char* what, int64_t expected, int64_t got) { expect(expected == got, what, expected, got); }

template <class A>
int64_t dim(const A& array, size_t i) {
  return static_cast<int64_t>(array.shape(i));
}

template <class A, class B>
void expect_same_shape(const char* what, const A& a, const B& b) {
  bool same = a.ndim() == b.ndim();
  for (size_t i = 0; same && i < a.ndim(); ++i) same = a.shape(i) == b.shape(i);
  if (!same) refuse(std::string(what) + " must have the same shape");
}

// --- weights ---

class PackedWeight {
 public:
  PackedWeight(const std::string& format, int64_t rows, int64_t cols, nb::object buffer, const std::string& layout)
      : rows_(rows), cols_(cols) {
    const Kernels& table = portable::kernels;
    while (format_ < table.n_formats && format != table.formats[format_].name) ++format_;
    if (format_ == table.n_formats) refuse("unknown weight format '" + format + "'");
    if (rows < 1 || cols < 1 || rows > INT32_MAX || cols > INT32_MAX)
      refuse("a weight needs 1 to 2^31 - 1 rows and columns, got [" + text(rows) + ", " + text(cols) + "]");
    if (cols % info().block_elements)
      refuse(format + " stores blocks of " + text(info().block_elements) + " columns, got " + text(cols) + " columns");
    if (layout == "panels" && info().has_panels && rows % kPanelRows == 0) layout_ = Layout::panels;
    else if (layout == "lut" && info().has_lut && rows % kLutRows == 0) layout_ = Layout::lut;
    else if (layout != "rows")
      refuse("a " + format + " [" + text(rows) + ", " + text(cols) + "] weight has no layout '" + layout + "'");
    if (!buffer.is_none()) bind(nb::cast<Bytes>(buffer, false));
  }

  void bind(Bytes buffer) {
    expect_size("bytes of the weight's buffer", n_bytes(), static_cast<int64_t>(buffer.size()));
    buffer_ = std::move(buffer);
  }

  const FormatInfo& info() const { return portable::kernels.formats[format_]; }
  int format() const { return format_; }
  const char* format_name() const { return info().name; }
  Layout layout() const { return layout_; }
  const char* layout_name() const { return layout_ == Layout::rows ? "rows" : layout_ == Layout::panels ? "panels" : "lut"; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t n_bytes() const { return rows_ * info().row_bytes(cols_); }
  Bytes buffer() const { return buffer_; }

  // The bound array; the copy keeps it alive while kernels read it.
  Bytes bound() const {
    if (!buffer_.is_valid())
      refuse(std::string("the ") + format_name() + " [" + text(rows_) + ", " + text(cols_) + "] weight has no buffer");
    return buffer_;
  }

 private:
  int format_ = 0;
  Layout layout_ = Layout::rows;
  int64_t rows_, cols_;
  Bytes buffer_;
};

struct Products {  // what matmul multiplies with, and where the results go
  std::vector<nb::object> kept;
  std::vector<const PackedWeight*> weights;
  std::vector<MatrixOut> outs;
  bool int8;
};

bool is_int8(const std::string& activations) {
  if (activations != "int8" && activations != "float32")
    refuse("activations must be int8 or float32, got '" + activations + "'");
  return activations == "int8";
}

Products products(nb::sequence weights, nb::sequence outs, const std::string& activations) {
  Products p{{}, {}, {}, is_int8(activations)};
  expect_size("number of outs", static_cast<int64_t>(nb::len(weights)), static_cast<int64_t>(nb::len(outs)));
  for (nb::handle weight : weights) {
    p.weights.push_back(nb::cast<const PackedWeight*>(weight));
    p.kept.push_back(nb::borrow(weight));
  }
  for (nb::handle out : outs) {
    if (!nb::try_cast(out, p.outs.emplace_back(), false))
      throw nb::type_error("outs must be writable, C-contiguous float32 arrays [n_tokens, rows]");
  }
  return p;
}

void multiply(Matrix x, const Products& p, bool add, BytesOut scratch) {
  const size_t n = p.weights.size();
  std::vector<Weight> views(n);
  std::vector<Bytes> kept(n);
  for (size_t i = 0; i < n; ++i) {
    const PackedWeight& weight = *p.weights[i];
    expect_size("columns of the weight", dim(x, 1), weight.cols());
    expect_size("tokens of the output", dim(x, 0), dim(p.outs[i], 0));
    expect_size("columns of the output", weight.rows(), dim(p.outs[i], 1));
    kept[i] = weight.bound();
    views[i] = {weight.format(), weight.layout(), weight.rows(), kept[i].data(), p.outs[i].data()};
  }
  if (x.size() == 0 || n == 0) return;
  const MatmulArgs args{x.data(), dim(x, 0), dim(x, 1),      views.data(), static_cast<int>(n),
                        p.int8,   add,       scratch.data(), n_threads()};
  const int64_t needed = kernels().matmul_scratch(args);
  expect(static_cast<int64_t>(scratch.size()) >= needed, "bytes of scratch", needed, scratch.size());
  nb::gil_scoped_release release;
  kernels().matmul(args);
}

void matmul(Matrix x, nb::sequence weights, nb::sequence outs, const std::string& activations, bool add,
            BytesOut scratch) {
  multiply(std::move(x), products(weights, outs, activations), add, std::move(scratch));
}

void embed(Array<const int32_t, nb::ndim<1>> ids, const PackedWeight& weight, MatrixOut out, float scale) {
  expect_size("rows of out", dim(ids, 0), dim(out, 0));
  expect_size("columns of out", weight.cols(), dim(out, 1));
  const Bytes kept = weight.bound();
  const int64_t n = dim(ids, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (ids.data()[i] < 0 || ids.data()[i] >= weight.rows())
      refuse("token ids must be 0 to " + text(weight.rows() - 1) + ", got " + text(ids.data()[i]));
  }
  nb::gil_scoped_release release;
  const Weight view{weight.format(), weight.layout(), weight.rows(), kept.data(), nullptr};
  kernels().embed(ids.data(), n, view, weight.cols(), scale, out.data());
}

void pack_panels(const std::string& format, Bytes rows, int64_t n_rows, int64_t n_cols, BytesOut out) {
  const PackedWeight shape(format, n_rows, n_cols, nb::none(), "panels");  // checks that there are such panels
  expect_size("bytes of rows", shape.n_bytes(), static_cast<int64_t>(rows.size()));
  expect_size("bytes of out", shape.n_bytes(), static_cast<int64_t>(out.size()));
  nb::gil_scoped_release release;
  kernels().pack_panels(shape.format(), rows.data(), n_rows, n_cols, out.data());
}

void pack_lut(const std::string& format, Bytes rows, int64_t n_rows, int64_t n_cols, BytesOut out) {
  const PackedWeight shape(format, n_rows, n_cols, nb::none(), "lut");
  expect_size("bytes of rows", shape.n_bytes(), static_cast<int64_t>(rows.size()));
  expect_size("bytes of out", shape.n_bytes(), static_cast<int64_t>(out.size()));
  nb::gil_scoped_release release;
  kernels().pack_lut(shape.format(), rows.data(), n_rows, n_cols, out.data());
}

void plane_matmul(Matrix x, Bytes weight, MatrixOut out, int weight_bits, int64_t group, float zero, bool has_minimum,
                  int activation_bits, bool add, BytesOut scratch) {
  if (weight_bits < 1 || weight_bits > 8 || activation_bits < 1 || activation_bits > 8)
    refuse("codes have 1 to 8 bits, got weights of " + text(weight_bits) + " and activations of " +
           text(activation_bits));
  if (group < 32 || group % 32 || group > kMostPlaneColumns)
    refuse("planes have groups of 32 to " + text(kMostPlaneColumns) + " columns, whole words of 32, got " + text(group));
  expect_size("tokens of the output", dim(x, 0), dim(out, 0));
  const PlaneArgs args{x.data(),        dim(x, 0), dim(x, 1),   weight.data(), dim(out, 1), group,          weight_bits,
                       activation_bits, zero,      has_minimum, add,           out.data(),  scratch.data(), n_threads()};
  expect_size("bytes of the weight's buffer", kernels().plane_bytes(args), static_cast<int64_t>(weight.size()));
  const int64_t needed = kernels().plane_scratch(args);
  expect(static_cast<int64_t>(scratch.size()) >= needed, "bytes of scratch", needed, scratch.size());
  if (x.size() == 0) return;
  nb::gil_scoped_release release;
  kernels().plane_matmul(args);
}

// --- parts ---

class Part {
 public:
  Part(const std::string& kind, int64_t rows, int64_t cols, nb::object buffer) : rows_(rows), cols_(cols) {
    const Kernels& table = portable::kernels;
    while (kind_ < table.n_parts && kind != table.parts[kind_].name) ++kind_;
    if (kind_ == table.n_parts) refuse("unknown part kind '" + kind + "'");
    if (rows < 1 || cols < 1 || rows > INT32_MAX || cols > INT32_MAX)
      refuse("a part needs 1 to 2^31 - 1 rows and columns, got [" + text(rows) + ", " + text(cols) + "]");
    if (!buffer.is_none()) bind(nb::cast<Bytes>(buffer, false));
  }

  void bind(Bytes buffer) {
    PartArgs args{};
    args.n_rows = rows_, args.n_cols = cols_;
    args.data = buffer.data(), args.n_bytes = static_cast<int64_t>(buffer.size());
    if (const char* flaw = portable::kernels.parts[kind_].flaw(args))
      refuse(name() + " [" + text(rows_) + ", " + text(cols_) + "]: " + flaw);
    buffer_ = std::move(buffer);
  }
  void unbind() { buffer_ = Bytes(); }

  const PartKernel& kernel() const { return kernels().parts[kind_]; }
  std::string name() const { return portable::kernels.parts[kind_].name; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  Bytes buffer() const { return buffer_; }

 private:
  int kind_ = 0;
  int64_t rows_, cols_;
  Bytes buffer_;
};

void part_matmul(Matrix x, const Part& part, MatrixOut out, bool add, BytesOut scratch) {
  expect_size("columns of the part", dim(x, 1), part.cols());
  expect_size("tokens of the output", dim(x, 0), dim(out, 0));
  expect_size("columns of the output", part.rows(), dim(out, 1));
  const Bytes data = part.buffer();
  if (!data.is_valid()) {  // nothing is added
    if (!add) std::fill_n(out.data(), out.size(), 0.0f);
    return;
  }
  const PartArgs args{x.data(), dim(x, 0), dim(x, 1),  part.rows(),    data.data(), static_cast<int64_t>(data.size()),
                      add,      out.data(), scratch.data(), n_threads()};
  if (x.size() == 0) return;
  const int64_t needed = part.kernel().scratch(args);
  expect(static_cast<int64_t>(scratch.size()) >= needed, "bytes of scratch", needed, scratch.size());
  nb::gil_scoped_release release;
  part.kernel().matmul(args);
}

// --- stacks of signed blocks ---

class SignStack {
 public:
  SignStack(int64_t rows, int64_t cols, int64_t rank, nb::sequence buffers) : rows_(rows), cols_(cols), rank_(rank) {
    if (rows < 1 || cols < 1 || rows > INT32_MAX || cols > INT32_MAX || rank < 1 || rank > kMostSignRanks)
      refuse("a stack needs 1 to 2^31 - 1 rows and columns and a rank of 1 to " + text(kMostSignRanks) + ", got [" +
             text(rows) + ", " + text(cols) + "] of rank " + text(rank));
    if (nb::len(buffers)) bind(std::move(buffers));
  }

  void bind(nb::sequence buffers) {
    std::vector<Bytes> bound;
    for (nb::handle buffer : buffers) {
      bound.push_back(nb::cast<Bytes>(buffer, false));
      expect_size("bytes of a block", block_bytes(), static_cast<int64_t>(bound.back().size()));
    }
    if (bound.empty()) refuse("a stack needs one block or more, got none");
    buffers_ = std::move(bound);
  }

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t rank() const { return rank_; }
  int64_t block_bytes() const { return portable::kernels.sign_bytes(args({}, {}, true, false, {})); }
  const std::vector<Bytes>& buffers() const { return buffers_; }

  SignArgs args(const Matrix& x, const std::vector<const uint8_t*>& blocks, bool int8, bool add,
                const MatrixOut& out) const {
    SignArgs s{};
    if (x.is_valid()) {
      s.x = x.data();
      s.n_tokens = dim(x, 0);
      s.out = out.data();
    }
    s.n_cols = cols_;
    s.n_rows = rows_;
    s.rank = rank_;
    s.blocks = blocks.data();
    s.n_blocks = static_cast<int64_t>(blocks.size());
    s.int8 = int8;
    s.add = add;
    s.n_threads = n_threads();
    return s;
  }

 private:
  int64_t rows_, cols_, rank_;
  std::vector<Bytes> buffers_;
};

void sign_matmul(Matrix x, const SignStack& stack, MatrixOut out, const std::string& activations, bool add,
                 BytesOut scratch) {
  expect_size("columns of the stack", dim(x, 1), stack.cols());
  expect_size("tokens of the output", dim(x, 0), dim(out, 0));
  expect_size("columns of the output", stack.rows(), dim(out, 1));
  const std::vector<Bytes> kept = stack.buffers();
  if (kept.empty()) refuse("the stack [" + text(stack.rows()) + ", " + text(stack.cols()) + "] has no blocks");
  std::vector<const uint8_t*> blocks;
  for (const Bytes& buffer : kept) blocks.push_back(buffer.data());
  SignArgs args = stack.args(x, blocks, is_int8(activations), add, out);
  if (args.n_tokens == 0) return;
  const int64_t needed = kernels().sign_scratch(args);
  expect(static_cast<int64_t>(scratch.size()) >= needed, "bytes of scratch", needed, scratch.size());
  args.scratch = scratch.data();
  nb::gil_scoped_release release;
  kernels().sign_matmul(args);
}

// --- fused ---

void rmsnorm(Matrix x, Vector weight, float eps, MatrixOut out, bool plus_one) {
  expect_same_shape("x and out", x, out);
  expect_size("length of the norm's weight", dim(x, 1), dim(weight, 0));
  nb::gil_scoped_release release;
  kernels().rmsnorm(x.data(), weight.data(), eps, plus_one, dim(x, 0), dim(x, 1), out.data());
}

void head_rmsnorm(MatrixOut x, int64_t n_heads, int64_t head_dim, Vector weight, float eps, bool plus_one) {
  expect(n_heads > 0 && head_dim > 0, "n_heads and head_dim", 1, n_heads < head_dim ? n_heads : head_dim);
  expect_size("columns of x", n_heads * head_dim, dim(x, 1));
  expect_size("length of the norm's weight", head_dim, dim(weight, 0));
  nb::gil_scoped_release release;
  kernels().rmsnorm(x.data(), weight.data(), eps, plus_one, dim(x, 0) * n_heads, head_dim, x.data());
}

void rope(MatrixOut x, int64_t n_heads, int64_t head_dim, Matrix cos, Matrix sin, bool interleaved) {
  expect(n_heads > 0 && head_dim > 0, "n_heads and head_dim", 1, n_heads < head_dim ? n_heads : head_dim);
  expect_size("columns of x", n_heads * head_dim, dim(x, 1));
  expect_same_shape("cos and sin", cos, sin);
  expect_size("rows of cos", dim(x, 0), dim(cos, 0));
  expect(2 * dim(cos, 1) <= head_dim, "columns of cos, at most", head_dim / 2, dim(cos, 1));
  nb::gil_scoped_release release;
  kernels().rope(x.data(), dim(x, 0), n_heads, head_dim, cos.data(), sin.data(), dim(cos, 1), interleaved);
}

// Channels of each head in another order: channel c of a head gets what was channel order[its key head][c]. A head at a
// time is copied, so that the order may go both ways.
using Orders = Array<const uint16_t, nb::ndim<2>>;  // [n_kv_heads, head_dim]

void reorder(MatrixOut x, Orders orders) {
  constexpr int64_t kMostChannels = 1024, kAlone = 1 << 16;
  const int64_t n_kv_heads = dim(orders, 0), head_dim = dim(orders, 1), n_tokens = dim(x, 0), width = dim(x, 1);
  expect(head_dim > 0 && head_dim <= kMostChannels, "channels of a head, at most", kMostChannels, head_dim);
  expect(n_kv_heads > 0 && width % (n_kv_heads * head_dim) == 0, "columns of x, a multiple of", n_kv_heads * head_dim,
         width);
  for (int64_t i = 0; i < n_kv_heads * head_dim; ++i)
    expect(orders.data()[i] < head_dim, "channels in an order, below", head_dim, orders.data()[i]);
  const int64_t n_heads = width / head_dim, sharing = n_heads / n_kv_heads;
  nb::gil_scoped_release release;
  parallel_for(n_tokens, n_tokens * width < kAlone ? 1 : n_threads(), [&](int64_t token, int) {
    float before[kMostChannels];
    for (int64_t h = 0; h < n_heads; ++h) {
      float* const head = x.data() + token * width + h * head_dim;
      const uint16_t* const order = orders.data() + h / sharing * head_dim;
      std::copy(head, head + head_dim, before);
      for (int64_t c = 0; c < head_dim; ++c) head[c] = before[order[c]];
    }
  });
}

void glu(Array<const float> gate, Array<const float> up, Array<float> out, const std::string& activation) {
  expect_same_shape("gate and up", gate, up);
  expect_same_shape("gate and out", gate, out);
  const bool silu = activation == "silu";
  if (!silu && activation != "gelu_tanh") refuse("activation must be silu or gelu_tanh, got '" + activation + "'");
  nb::gil_scoped_release release;
  kernels().glu(gate.data(), up.data(), out.data(), static_cast<int64_t>(gate.size()),
                silu ? Activation::silu : Activation::gelu_tanh);
}

void add_(Array<float> x, Array<const float> y) {
  const bool each_row = x.ndim() == 2 && y.ndim() == 1;
  if (each_row) expect_size("length of y", dim(x, 1), dim(y, 0));
  else expect_same_shape("x and y", x, y);
  const auto n = static_cast<int64_t>(y.size()), n_rows = each_row ? dim(x, 0) : 1;
  nb::gil_scoped_release release;
  for (int64_t row = 0; row < n_rows; ++row) kernels().add(x.data() + row * n, y.data(), n);
}

int64_t argmax(Vector logits) {
  if (logits.size() == 0) refuse("argmax of an empty array");
  nb::gil_scoped_release release;
  return kernels().argmax(logits.data(), dim(logits, 0));
}

void lowest_before(nb::ndarray<const float, nb::ndim<2>, nb::device::cpu> scores,
                   nb::ndarray<const int32_t, nb::ndim<2>, nb::device::cpu> position, int32_t end,
                   Array<int32_t, nb::ndim<1>> out) {
  expect_size("rows of positions", dim(scores, 0), dim(position, 0));
  expect_size("columns of positions", dim(scores, 1), dim(position, 1));
  expect_size("rows of out", dim(scores, 0), dim(out, 0));
  expect(scores.stride(1) == 1 && position.stride(1) == 1, "distance of a row's numbers", 1, scores.stride(1));
  if (dim(scores, 1) > INT32_MAX) refuse("rows have at most 2147483647 columns");
  nb::gil_scoped_release release;
  for (int64_t row = 0; row < dim(scores, 0); ++row)
    out.data()[row] = kernels().lowest_before(scores.data() + row * scores.stride(0),
                                              position.data() + row * position.stride(0), dim(scores, 1), end);
}

void top_k(Vector logits, Array<float, nb::ndim<1>> values, Array<int32_t, nb::ndim<1>> ids) {
  const int64_t n = dim(logits, 0), k = dim(values, 0);
  expect_size("number of ids", k, dim(ids, 0));
  if (k < 1 || k > n || n > INT32_MAX) refuse("top_k takes 1 to " + text(n) + " of " + text(n) + " logits, got " + text(k));
  nb::gil_scoped_release release;
  kernels().top_k(logits.data(), n, k, values.data(), ids.data());
}

// --- rounding ---

struct LevelArrays {  // a grid as barefoot.ops.grids.Levels has it
  Vector values, bounds;
  Array<const uint8_t, nb::ndim<1>> codes;
  Levels view;
};

LevelArrays levels_of(nb::tuple given) {
  if (nb::len(given) != 7) refuse("a grid has 7 fields");
  const auto array = [&](size_t i, auto& to) {
    if (!nb::try_cast(given[i], to, false)) throw nb::type_error("values, bounds and codes of a grid must be arrays");
  };
  LevelArrays levels;
  array(0, levels.values);
  array(1, levels.bounds);
  array(2, levels.codes);
  const int64_t n = dim(levels.values, 0), group = nb::cast<int64_t>(given[5]);
  if (n < 2 || n > kMostLevels) refuse("a grid has 2 to " + text(kMostLevels) + " levels, got " + text(n));
  expect_size("bounds between the levels", n - 1, dim(levels.bounds, 0));
  expect_size("codes of the levels", n, dim(levels.codes, 0));
  const bool even = nb::cast<bool>(given[3]);
  if (even && levels.values.data()[n - 1] - levels.values.data()[0] != static_cast<float>(n - 1))
    refuse("values of an even grid must be consecutive integers");
  if (group < 16 || group % 16) refuse("groups must be whole runs of 16 elements, got " + text(group));
  const std::string rule = given[6].is_none() ? "" : nb::cast<std::string>(given[6]);
  levels.view = {levels.values.data(), levels.bounds.data(), levels.codes.data(), n, even, nb::cast<bool>(given[4]),
                 group, rule == "two means" ? RangeRule::two_means
                        : rule == "ternary" ? RangeRule::ternary
                                            : RangeRule::range};
  return levels;
}

RoundingArgs rounding(const Levels& levels, const Matrix& x) {
  expect(dim(x, 1) % levels.group == 0, "columns, a multiple of", levels.group, dim(x, 1));
  return {levels, x.data(), dim(x, 0), dim(x, 1)};
}

template <class A>
void expect_params(const Levels& levels, int64_t n_rows, const A& params) {
  expect_size("rows of params", n_rows, dim(params, 0));
  expect_size("params of a group", levels.n_params(), dim(params, 2));
}

using Importance = std::optional<Array<const float>>;  // of each column, or of each element

bool is_of_row(const RoundingArgs& args, const Importance& importance) {
  if (!importance) return false;
  const bool of_row = importance->ndim() == 2;
  expect_size("elements of importance", of_row ? args.n_rows * args.n_cols : args.n_cols,
              static_cast<int64_t>(importance->size()));
  return of_row;
}

void fit_groups(Matrix x, nb::tuple grid, Importance importance, Vector shrinks, Vector steps, int n_refits,
                Array<float, nb::ndim<3>> params) {
  const LevelArrays arrays = levels_of(grid);
  const Levels& levels = arrays.view;
  const RoundingArgs args = rounding(levels, x);
  expect_params(levels, args.n_rows, params);
  expect_size("groups of params", args.n_cols / levels.group, dim(params, 1));
  const bool of_row = is_of_row(args, importance);
  nb::gil_scoped_release release;
  kernels().fit_groups(args, importance ? importance->data() : nullptr, of_row,
                       {shrinks.data(), steps.data(), dim(shrinks, 0), dim(steps, 0), n_refits}, params.data());
}

void group_errors(Matrix x, nb::tuple grid, Array<const float, nb::ndim<3>> params, Importance importance,
                  MatrixOut errors) {
  const LevelArrays arrays = levels_of(grid);
  const Levels& levels = arrays.view;
  const RoundingArgs args = rounding(levels, x);
  expect_params(levels, args.n_rows, params);
  expect_size("groups of params", args.n_cols / levels.group, dim(params, 1));
  expect_size("rows of errors", args.n_rows, dim(errors, 0));
  expect_size("groups of errors", args.n_cols / levels.group, dim(errors, 1));
  const bool of_row = is_of_row(args, importance);
  nb::gil_scoped_release release;
  kernels().group_errors(args, params.data(), importance ? importance->data() : nullptr, of_row, errors.data());
}

void round_groups(Matrix x, nb::tuple grid, Array<const float, nb::ndim<3>> params,
                  Array<uint8_t, nb::ndim<2>> codes) {
  const LevelArrays arrays = levels_of(grid);
  const Levels& levels = arrays.view;
  const RoundingArgs args = rounding(levels, x);
  expect_params(levels, args.n_rows, params);
  expect_size("groups of params", args.n_cols / levels.group, dim(params, 1));
  expect_same_shape("x and codes", x, codes);
  nb::gil_scoped_release release;
  kernels().round_groups(args, params.data(), codes.data());
}

bool encode_groups(Matrix x, nb::tuple grid, int bits, bool is_signed, BytesOut out) {
  const LevelArrays arrays = levels_of(grid);
  const RoundingArgs args = rounding(arrays.view, x);
  const int64_t group = args.levels.group;
  if (group % 32 || group > kMostEncoded)
    refuse("blocks have whole chunks of 32 elements, at most " + text(kMostEncoded) + ", got " + text(group));
  const int64_t block = 2 * args.levels.n_params() + group * bits / 8;
  expect_size("bytes of out", args.n_rows * (args.n_cols / group) * block, static_cast<int64_t>(out.size()));
  nb::gil_scoped_release release;
  return kernels().encode_groups(args, bits, is_signed, out.data());
}

void feedback_round(Matrix weights, MatrixOut targets, nb::tuple grid, Array<const float, nb::ndim<3>> params,
                    Array<const int32_t, nb::ndim<1>> groups, Matrix mixing, Array<uint8_t, nb::ndim<2>> codes) {
  const LevelArrays arrays = levels_of(grid);
  const Levels& levels = arrays.view;
  const int64_t n_cols = dim(weights, 1), n_groups = dim(params, 1);
  expect_same_shape("weights and targets", weights, targets);
  expect_same_shape("weights and codes", weights, codes);
  expect_params(levels, dim(weights, 0), params);
  expect(n_cols <= kMostFeedback, "columns, at most", kMostFeedback, n_cols);
  expect_size("rows of mixing", n_cols, dim(mixing, 0));
  expect_size("columns of mixing", n_cols, dim(mixing, 1));
  expect_size("number of groups", n_cols, dim(groups, 0));
  for (int64_t k = 0; k < n_cols; ++k)
    if (groups.data()[k] < 0 || groups.data()[k] >= n_groups)
      refuse("groups must be 0 to " + text(n_groups - 1) + ", got " + text(groups.data()[k]));
  nb::gil_scoped_release release;
  kernels().feedback_round({levels, weights.data(), targets.data(), params.data(), groups.data(), mixing.data(),
                            codes.data(), dim(weights, 0), n_cols, n_groups});
}

// --- KV ---

KvFormat kv_format(const std::string& name) {
  if (name == "f32") return KvFormat::f32;
  if (name == "f16") return KvFormat::f16;
  if (name == "q8") return KvFormat::q8;
  if (name == "q4") return KvFormat::q4;
  if (name == "q3") return KvFormat::q3;
  if (name == "q2") return KvFormat::q2;
  if (name == "bfp4") return KvFormat::bfp4;
  refuse("unknown KV format '" + name + "'; known: bfp4, f16, f32, q2, q3, q4, q8");
}

KvShape kv_shape(const std::string& format, int64_t n_kv_heads, int64_t head_dim, int64_t capacity) {
  if (n_kv_heads < 1 || capacity < 1) refuse("n_kv_heads and capacity must be positive");
  const KvFormat known = kv_format(format);
  const int64_t whole = known == KvFormat::q3 ? 8 : known == KvFormat::q2 ? 4 : 2;
  if (head_dim < whole || head_dim % whole)
    refuse("head_dim must be a positive multiple of " + text(whole) + ", got " + text(head_dim));
  return {known, n_kv_heads, head_dim, capacity};
}

// Where the tokens of a call belong: all to one sequence, from n_past on, or each to its own.
struct Where {
  int64_t sequence = 0, n_past = 0;
  const std::vector<Spot>* spots = nullptr;
  const Spot* data() const { return spots ? spots->data() : nullptr; }
};

std::vector<Spot> spots_of(const std::vector<int64_t>& sequences, const std::vector<int64_t>& positions) {
  expect_size("number of positions", static_cast<int64_t>(sequences.size()), static_cast<int64_t>(positions.size()));
  std::vector<Spot> spots;
  for (size_t i = 0; i < sequences.size(); ++i) {
    for (const Spot& other : spots)
      if (other.sequence == sequences[i]) refuse("sequence " + text(sequences[i]) + " is there twice");
    spots.push_back({sequences[i], positions[i]});
  }
  return spots;
}

// Of one sequence, or of several.
template <class A>
void expect_store(const A& buffer, const KvShape& kv) {
  const size_t last = buffer.ndim() - 1;
  expect_size("key heads of the KV buffer", kv.n_kv_heads, dim(buffer, last - 2));
  expect_size("slots of the KV buffer", kv.capacity, dim(buffer, last - 1));
  expect_size("bytes of a KV row", kv.row_bytes(), dim(buffer, last));
}

template <class A>
void expect_sequences(const A& buffer, const Where& where, int64_t n_tokens) {
  const int64_t n = buffer.ndim() == 4 ? dim(buffer, 0) : 1;
  const auto check = [&](int64_t sequence) {
    expect(0 <= sequence && sequence < n, "sequence, below the number of sequences", n, sequence);
  };
  if (!where.spots) return check(where.sequence);
  expect_size("tokens", static_cast<int64_t>(where.spots->size()), n_tokens);
  for (const Spot& spot : *where.spots) check(spot.sequence);
}

template <class A>
void append(const Matrix& k, const Matrix& v, const A& k_buf, const A& v_buf, const std::string& fmt, int64_t capacity,
            const Where& where) {
  expect_same_shape("k and v", k, v);
  const int64_t n_kv_heads = dim(k_buf, k_buf.ndim() - 3);
  expect(n_kv_heads > 0 && dim(k, 1) % n_kv_heads == 0, "columns of k, a multiple of", n_kv_heads, dim(k, 1));
  const KvShape kv = kv_shape(fmt, n_kv_heads, dim(k, 1) / n_kv_heads, capacity);
  expect_store(k_buf, kv);
  expect_store(v_buf, kv);
  expect_sequences(k_buf, where, dim(k, 0));
  expect_sequences(v_buf, where, dim(k, 0));
  const std::vector<Spot> one{{where.sequence, where.n_past}};
  const std::vector<Spot>& starts = where.spots ? *where.spots : one;
  const int64_t n_each = where.spots ? 1 : dim(k, 0);
  expect(n_each <= capacity, "tokens, at most the capacity", capacity, n_each);
  for (const Spot& start : starts) expect(start.position >= 0, "start", 0, start.position);
  nb::gil_scoped_release release;
  int64_t row = 0;
  for (const Spot& start : starts) {
    kernels().kv_append(k.data() + row, n_each, kv, start.position, k_buf.data() + start.sequence * kv.bytes());
    kernels().kv_append(v.data() + row, n_each, kv, start.position, v_buf.data() + start.sequence * kv.bytes());
    row += n_each * dim(k, 1);
  }
}

void kv_append(Matrix k, Matrix v, KvBytesOut k_buf, KvBytesOut v_buf, const std::string& fmt, int64_t capacity,
               int64_t start) {
  append(k, v, k_buf, v_buf, fmt, capacity, {0, start});
}

void kv_append_each(Matrix k, Matrix v, KvStoreOut k_buf, KvStoreOut v_buf, const std::string& fmt, int64_t capacity,
                    const std::vector<int64_t>& sequences, const std::vector<int64_t>& positions) {
  const std::vector<Spot> spots = spots_of(sequences, positions);
  append(k, v, k_buf, v_buf, fmt, capacity, {0, 0, &spots});
}

template <class A>
void attend(const Matrix& q, const A& k_buf, const A& v_buf, const std::string& fmt, const MatrixOut& out,
            int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int64_t capacity, const Where& where,
            int64_t n_tokens, float scale, int64_t window, float softcap, bool int8, const BytesOut& scratch) {
  const KvShape kv = kv_shape(fmt, n_kv_heads, head_dim, capacity);
  expect_store(k_buf, kv);
  expect_store(v_buf, kv);
  expect(n_heads > 0 && n_heads % n_kv_heads == 0, "n_heads, a multiple of", n_kv_heads, n_heads);
  expect_same_shape("q and out", q, out);
  expect_size("tokens of q", n_tokens, dim(q, 0));
  expect_size("columns of q", n_heads * head_dim, dim(q, 1));
  if (q.data() == out.data() && q.size()) refuse("q and out must not be the same array");
  expect_sequences(k_buf, where, n_tokens);
  expect_sequences(v_buf, where, n_tokens);
  const auto expect_keys = [&](int64_t n_past, int64_t n) {
    if (n_past < 0 || window < 0) refuse("n_past and window must not be negative");
    const int64_t reach = n_past + n, needed = window > 0 && window - 1 + n < reach ? window - 1 + n : reach;
    expect(needed <= capacity, "positions needed at once, at most the capacity", capacity, needed);
  };
  if (!where.spots) expect_keys(where.n_past, n_tokens);
  else for (const Spot& spot : *where.spots) expect_keys(spot.position, 1);
  if (n_tokens == 0) return;
  const int64_t offset = where.sequence * kv.bytes();
  const AttentionArgs args{q.data(),     k_buf.data() + offset, v_buf.data() + offset, kv,     out.data(),
                           n_heads,      where.n_past,          n_tokens,              window, scale, softcap,
                           int8,         scratch.data(),        n_threads(),           where.data()};
  const int64_t needed = kernels().attention_scratch(args);
  expect(static_cast<int64_t>(scratch.size()) >= needed, "bytes of scratch", needed, scratch.size());
  nb::gil_scoped_release release;
  kernels().attention(args);
}

void attention(Matrix q, KvBytes k_buf, KvBytes v_buf, const std::string& fmt, MatrixOut out, int64_t n_heads,
               int64_t n_kv_heads, int64_t head_dim, int64_t capacity, int64_t n_past, int64_t n_tokens, float scale,
               int64_t window, float softcap, const std::string& activations, BytesOut scratch) {
  attend(q, k_buf, v_buf, fmt, out, n_heads, n_kv_heads, head_dim, capacity, {0, n_past}, n_tokens, scale, window,
         softcap, is_int8(activations), scratch);
}

void attention_each(Matrix q, KvStore k_buf, KvStore v_buf, const std::string& fmt, MatrixOut out, int64_t n_heads,
                    int64_t n_kv_heads, int64_t head_dim, int64_t capacity, const std::vector<int64_t>& sequences,
                    const std::vector<int64_t>& positions, float scale, int64_t window, float softcap,
                    BytesOut scratch) {
  const std::vector<Spot> spots = spots_of(sequences, positions);
  attend(q, k_buf, v_buf, fmt, out, n_heads, n_kv_heads, head_dim, capacity, {0, 0, &spots}, dim(q, 0), scale, window,
         softcap, false, scratch);
}

// --- segments of a store ---

using Counts = Array<const int32_t, nb::ndim<1>>;
using Extra = std::optional<Matrix>;  // of each entry

// A part of a KV store; the arrays stay the caller's, who changes what is in them.
class Segment {
 public:
  Segment(const std::string& key_format, KvBytes keys, const std::string& value_format, KvBytes values,
          int64_t key_dim, int64_t value_dim, Counts counts, int64_t group, Extra bias, Extra key_scale,
          Extra value_scale)
      : keys_(keys), values_(values), counts_(counts), bias_(bias), key_scale_(key_scale), value_scale_(value_scale) {
    const int64_t n_kv_heads = dim(values, 0);
    if (value_dim < 1 || key_dim < 1) refuse("key_dim and value_dim must be positive");
    if (group < kBlockRun || group % kBlockRun) refuse("group must be a multiple of 32, got " + text(group));
    const bool by_channel = is_blocks(value_format, 'c');
    args_.values_in_blocks = by_channel || is_blocks(value_format, 't');
    if (args_.values_in_blocks) {
      const int64_t positions = by_channel ? group : kBlockRun;
      args_.value_blocks = {block_bits(value_format), by_channel, positions, n_kv_heads, value_dim, dim(values, 1)};
      expect_size("bytes of a block of values", args_.value_blocks.block_bytes(), dim(values, 2));
    } else {
      args_.value_rows = kv_shape(value_format, n_kv_heads, value_dim, dim(values, 1));
      expect_store(values, args_.value_rows);
    }
    args_.keys_in_blocks = is_blocks(key_format, 'c');
    if (args_.keys_in_blocks) {
      args_.key_blocks = {block_bits(key_format), group, n_kv_heads, key_dim, dim(keys, 1)};
      expect_size("bytes of a block of keys", args_.key_blocks.block_bytes(), dim(keys, 2));
    } else {
      args_.key_rows = kv_shape(key_format, n_kv_heads, key_dim, dim(keys, 1));
      expect_store(keys, args_.key_rows);
    }
    expect_size("key heads of the keys", n_kv_heads, dim(keys, 0));
    expect_size("counts", n_kv_heads, dim(counts, 0));
    for (const Extra* extra : {&bias_, &key_scale_, &value_scale_})
      if (*extra) {
        expect_size("key heads of bias and scales", n_kv_heads, dim(**extra, 0));
        expect_size("entries of bias and scales", stride(), dim(**extra, 1));
      }
    args_.bias = bias_ ? bias_->data() : nullptr;
    args_.key_scale = key_scale_ ? key_scale_->data() : nullptr;
    args_.value_scale = value_scale_ ? value_scale_->data() : nullptr;
    args_.k = keys_.data();
    args_.v = values_.data();
    args_.counts = counts_.data();
    args_.stride = stride();
  }

  // Entries that both keys and values have room for.
  int64_t stride() const { return left(0, 0); }

  SegmentArgs args() const {
    SegmentArgs a = args_;
    a.key_start = key_start;
    a.value_start = value_start;
    if (key_start < 0 || value_start < 0) refuse("key_start and value_start must not be negative");
    if ((args_.keys_in_blocks && key_start % kBlockRun) || (args_.values_in_blocks && value_start % kBlockRun))
      refuse("blocks are entered at a multiple of 32");
    const int64_t most = left(key_start, value_start);
    for (int64_t h = 0; h < a.n_kv_heads(); ++h)
      if (a.counts[h] < 0 || a.counts[h] > most)
        refuse("a segment of " + text(most) + " entries has a count of " + text(a.counts[h]));
    return a;
  }

  int64_t key_start = 0, value_start = 0;

 private:
  static bool is_blocks(const std::string& format, char kind) { return format.size() == 2 && format[0] == kind; }
  static int block_bits(const std::string& format) {
    const int bits = format[1] - '0';
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) refuse("blocks have codes of 2, 3, 4 or 8 bits, got " + format);
    return bits;
  }

  // Entries that there is room for from these positions on; rows are rings.
  int64_t left(int64_t first_key, int64_t first_value) const {
    const auto room = [](bool in_blocks, int64_t n, int64_t group, int64_t first) {
      return in_blocks ? n * group - first : n;
    };
    const int64_t of_keys = room(args_.keys_in_blocks, dim(keys_, 1), args_.key_blocks.group, first_key);
    const int64_t of_values = room(args_.values_in_blocks, dim(values_, 1), args_.value_blocks.group, first_value);
    return of_keys < of_values ? of_keys : of_values;
  }

  KvBytes keys_, values_;
  Counts counts_;
  Extra bias_, key_scale_, value_scale_;
  SegmentArgs args_{};
};

void attend_segment(Matrix q, const Segment& segment, Array<float, nb::ndim<3>> sums, MatrixOut tops, MatrixOut totals,
                    int64_t n_before, float scale, float softcap, std::optional<Array<float, nb::ndim<3>>> scores,
                    BytesOut scratch) {
  SegmentArgs a = segment.args();
  a.q = q.data();
  a.n_tokens = dim(q, 0);
  a.n_heads = dim(sums, 1);
  expect(a.n_heads > 0 && a.n_heads % a.n_kv_heads() == 0, "query heads, a multiple of", a.n_kv_heads(), a.n_heads);
  expect_size("columns of q", a.n_heads * a.key_dim(), dim(q, 1));
  expect_size("tokens of sums", a.n_tokens, dim(sums, 0));
  expect_size("columns of sums", a.value_dim(), dim(sums, 2));
  for (const MatrixOut* each : {&tops, &totals}) {
    expect_size("tokens of tops and totals", a.n_tokens, dim(*each, 0));
    expect_size("heads of tops and totals", a.n_heads, dim(*each, 1));
  }
  if (scores) {
    expect_size("heads of scores", a.n_heads, dim(*scores, 0));
    expect_size("tokens of scores", a.n_tokens, dim(*scores, 1));
    expect_size("entries of scores", a.stride, dim(*scores, 2));
    a.scores = scores->data();
  }
  if (n_before < -1) refuse("n_before must be -1 or more");
  if (a.n_tokens == 0) return;
  a.n_before = n_before;
  a.scale = scale;
  a.softcap = softcap;
  a.sums = sums.data();
  a.tops = tops.data();
  a.totals = totals.data();
  a.scratch = scratch.data();
  a.n_threads = n_threads();
  const int64_t needed = kernels().segment_scratch(a);
  expect(static_cast<int64_t>(scratch.size()) >= needed, "bytes of scratch", needed, scratch.size());
  nb::gil_scoped_release release;
  kernels().attend_segment(a);
}

void attention_mass(Array<const float, nb::ndim<3>> scores, Matrix tops, Matrix totals, Counts counts, RowsOut mass,
                    std::optional<Vector> thresholds) {
  MassArgs a{scores.data(), tops.data(), totals.data(), dim(scores, 1), dim(scores, 0), dim(mass, 0), dim(scores, 2),
             counts.data(), thresholds ? thresholds->data() : nullptr, mass.data(), mass.stride(0), n_threads()};
  expect(a.n_kv_heads > 0 && a.n_heads % a.n_kv_heads == 0, "query heads, a multiple of", a.n_kv_heads, a.n_heads);
  for (const Matrix* each : {&tops, &totals}) {
    expect_size("tokens of tops and totals", a.n_tokens, dim(*each, 0));
    expect_size("heads of tops and totals", a.n_heads, dim(*each, 1));
  }
  expect(mass.stride(1) == 1, "distance of a row's numbers in mass", 1, mass.stride(1));
  expect_size("counts", a.n_kv_heads, dim(counts, 0));
  const int64_t most = a.stride < dim(mass, 1) ? a.stride : dim(mass, 1);
  for (int64_t h = 0; h < a.n_kv_heads; ++h)
    expect(counts.data()[h] >= 0 && counts.data()[h] <= most, "count, at most", most, counts.data()[h]);
  if (thresholds) expect_size("thresholds", a.n_tokens, dim(*thresholds, 0));
  nb::gil_scoped_release release;
  kernels().attention_mass(a);
}

void kv_write(Matrix rows, KvBytesOut buffer, const std::string& fmt, Array<const int32_t, nb::ndim<2>> slots) {
  const int64_t n_kv_heads = dim(buffer, 0);
  expect(n_kv_heads > 0 && dim(rows, 1) % n_kv_heads == 0, "columns of the rows, a multiple of", n_kv_heads,
         dim(rows, 1));
  const KvShape kv = kv_shape(fmt, n_kv_heads, dim(rows, 1) / n_kv_heads, dim(buffer, 1));
  expect_store(buffer, kv);
  expect_size("key heads of the slots", n_kv_heads, dim(slots, 0));
  expect_size("tokens of the slots", dim(rows, 0), dim(slots, 1));
  for (size_t i = 0; i < slots.size(); ++i)
    if (slots.data()[i] < 0 || slots.data()[i] >= kv.capacity)
      refuse("slots must be 0 to " + text(kv.capacity - 1) + ", got " + text(slots.data()[i]));
  nb::gil_scoped_release release;
  kernels().kv_write(rows.data(), dim(rows, 0), kv, slots.data(), buffer.data());
}

// --- attention of packed documents ---

using Heads = Array<const float, nb::ndim<3>>;  // [n, heads, head_dim]
using HeadsOut = Array<float, nb::ndim<3>>;
using Lengths = Array<const int64_t, nb::ndim<1>>;

void expect_scratch(const FlashArgs& args, bool backward, const BytesOut& scratch) {
  const int64_t needed = kernels().flash_scratch(args, backward);
  expect(static_cast<int64_t>(scratch.size()) >= needed, "bytes of scratch", needed, scratch.size());
}

FlashArgs flash_args(const Heads& q, const Heads& k, const Heads& v, const Lengths& lengths, float scale,
                     int64_t window, float softcap, BytesOut& scratch) {
  expect_same_shape("k and v", k, v);
  expect_size("tokens of k", dim(q, 0), dim(k, 0));
  expect_size("head_dim of k", dim(q, 2), dim(k, 2));
  expect(dim(k, 1) > 0 && dim(q, 1) > 0 && dim(q, 1) % dim(k, 1) == 0, "query heads, a multiple of", dim(k, 1), dim(q, 1));
  if (dim(q, 2) < 1) refuse("head_dim must be positive");
  if (window < 0) refuse("window must be 0 or more, got " + text(window));
  int64_t left = dim(q, 0);
  for (int64_t i = 0; i < dim(lengths, 0); ++i) {
    const int64_t length = lengths.data()[i];
    if (length < 0 || length > left) refuse("lengths must not be negative, nor more than " + text(dim(q, 0)) + " in all");
    left -= length;
  }
  if (window >= dim(q, 0)) window = 0;
  return {q.data(), k.data(), v.data(), lengths.data(), dim(lengths, 0), dim(q, 0), dim(q, 1), dim(k, 1), dim(q, 2),
          window,   scale,    softcap,  scratch.data(), n_threads()};
}

void flash_forward(Heads q, Heads k, Heads v, Lengths lengths, HeadsOut out, MatrixOut lse, float scale, int64_t window,
                   float softcap, BytesOut scratch) {
  const FlashArgs args = flash_args(q, k, v, lengths, scale, window, softcap, scratch);
  expect_same_shape("q and out", q, out);
  expect_size("heads of lse", dim(q, 1), dim(lse, 0));
  expect_size("tokens of lse", dim(q, 0), dim(lse, 1));
  expect_scratch(args, false, scratch);
  nb::gil_scoped_release release;
  kernels().flash_forward(args, out.data(), lse.data());
}

void flash_backward(Heads d_out, Heads q, Heads k, Heads v, Heads out, Matrix lse, Lengths lengths, HeadsOut dq,
                    HeadsOut dk, HeadsOut dv, float scale, int64_t window, float softcap, BytesOut scratch) {
  const FlashArgs args = flash_args(q, k, v, lengths, scale, window, softcap, scratch);
  expect_same_shape("q and d_out", q, d_out);
  expect_same_shape("q and out", q, out);
  expect_same_shape("q and dq", q, dq);
  expect_same_shape("k and dk", k, dk);
  expect_same_shape("v and dv", v, dv);
  expect_size("heads of lse", dim(q, 1), dim(lse, 0));
  expect_size("tokens of lse", dim(q, 0), dim(lse, 1));
  expect_scratch(args, true, scratch);
  nb::gil_scoped_release release;
  kernels().flash_backward(args, {out.data(), lse.data(), d_out.data(), dq.data(), dk.data(), dv.data()});
}

// --- programs ---

// The first n rows of an array that the caller keeps alive.
template <class A>
A first(const A& array, int64_t n) {
  if (array.ndim() == 0 || n > dim(array, 0)) refuse("a program's arrays have " + text(array.ndim() ? dim(array, 0) : 0) +
                                                      " rows, and it is run on " + text(n) + " tokens");
  size_t shape[8] = {};
  if (array.ndim() > 8) refuse("arrays of more than 8 dimensions");
  for (size_t i = 0; i < array.ndim(); ++i) shape[i] = array.shape(i);
  shape[0] = static_cast<size_t>(n);
  return A(array.data(), array.ndim(), shape);
}

class Program {
 public:
  using Call = std::function<void(const Where&)>;
  using Recorded = std::function<Call(int64_t n_tokens)>;

  void record(Recorded op) {
    recorded_.push_back(std::move(op));
    n_tokens_ = -1;
  }

  void run(int64_t n_tokens, int64_t n_past, int64_t sequence) { call(n_tokens, {sequence, n_past}); }

  void run_each(const std::vector<int64_t>& sequences, const std::vector<int64_t>& positions) {
    const std::vector<Spot> spots = spots_of(sequences, positions);
    call(static_cast<int64_t>(spots.size()), {0, 0, &spots});
  }

 private:
  void call(int64_t n_tokens, const Where& where) {
    if (n_tokens < 1) refuse("a program runs on 1 token or more, got " + text(n_tokens));
    if (n_tokens != n_tokens_) {
      n_tokens_ = -1;
      calls_.clear();
      for (const Recorded& op : recorded_) calls_.push_back(op(n_tokens));
      n_tokens_ = n_tokens;
    }
    for (const Call& call : calls_) call(where);
  }

  std::vector<Recorded> recorded_;
  std::vector<Call> calls_;  // for the number of tokens of the last run: decoding repeats 1
  int64_t n_tokens_ = -1;
};

// Each op records itself with its full arrays, and is called with their first rows.
void record_matmul(Program& program, Matrix x, nb::sequence weights, nb::sequence outs, const std::string& activations,
                   bool add, BytesOut scratch) {
  program.record([=, all = products(weights, outs, activations)](int64_t n) -> Program::Call {
    Products p = all;
    for (MatrixOut& out : p.outs) out = first(out, n);
    return [=, x = first(x, n)](const Where&) { multiply(x, p, add, scratch); };
  });
}

void record_part_matmul(Program& program, Matrix x, nb::object part, MatrixOut out, bool add, BytesOut scratch) {
  const Part* view = nb::cast<const Part*>(part);
  program.record([=, kept = part](int64_t n) -> Program::Call {
    return [=, x = first(x, n), out = first(out, n)](const Where&) { part_matmul(x, *view, out, add, scratch); };
  });
}

void record_sign_matmul(Program& program, Matrix x, nb::object stack, MatrixOut out, const std::string& activations,
                        bool add, BytesOut scratch) {
  const SignStack* view = nb::cast<const SignStack*>(stack);
  is_int8(activations);
  program.record([=, kept = stack](int64_t n) -> Program::Call {
    return [=, x = first(x, n), out = first(out, n)](const Where&) {
      sign_matmul(x, *view, out, activations, add, scratch);
    };
  });
}

void record_rmsnorm(Program& program, Matrix x, Vector weight, float eps, MatrixOut out, bool plus_one) {
  program.record([=](int64_t n) -> Program::Call {
    return [=, x = first(x, n), out = first(out, n)](const Where&) { rmsnorm(x, weight, eps, out, plus_one); };
  });
}

void record_head_rmsnorm(Program& program, MatrixOut x, int64_t n_heads, int64_t head_dim, Vector weight, float eps,
                         bool plus_one) {
  program.record([=](int64_t n) -> Program::Call {
    return [=, x = first(x, n)](const Where&) { head_rmsnorm(x, n_heads, head_dim, weight, eps, plus_one); };
  });
}

void record_rope(Program& program, MatrixOut x, int64_t n_heads, int64_t head_dim, Matrix cos, Matrix sin,
                 bool interleaved) {
  program.record([=](int64_t n) -> Program::Call {
    return [=, x = first(x, n), cos = first(cos, n), sin = first(sin, n)](const Where&) {
      rope(x, n_heads, head_dim, cos, sin, interleaved);
    };
  });
}

void record_reorder(Program& program, MatrixOut x, Orders orders) {
  program.record([=](int64_t n) -> Program::Call {
    return [=, x = first(x, n)](const Where&) { reorder(x, orders); };
  });
}

void record_glu(Program& program, Array<const float> gate, Array<const float> up, Array<float> out,
                const std::string& activation) {
  program.record([=](int64_t n) -> Program::Call {
    return [=, gate = first(gate, n), up = first(up, n), out = first(out, n)](const Where&) {
      glu(gate, up, out, activation);
    };
  });
}

void record_add(Program& program, Array<float> x, Array<const float> y) {
  program.record([=](int64_t n) -> Program::Call {
    return [x = first(x, n), y = y.ndim() == 1 ? y : first(y, n)](const Where&) { add_(x, y); };
  });
}

void record_kv_append(Program& program, Matrix k, Matrix v, KvStoreOut k_buf, KvStoreOut v_buf, const std::string& fmt,
                      int64_t capacity) {
  program.record([=](int64_t n) -> Program::Call {
    return [=, k = first(k, n), v = first(v, n)](const Where& where) {
      append(k, v, k_buf, v_buf, fmt, capacity, where);
    };
  });
}

void record_attention(Program& program, Matrix q, KvStore k_buf, KvStore v_buf, const std::string& fmt, MatrixOut out,
                      int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int64_t capacity, float scale,
                      int64_t window, float softcap, const std::string& activations, BytesOut scratch) {
  program.record([=](int64_t n) -> Program::Call {
    return [=, int8 = is_int8(activations), q = first(q, n), out = first(out, n)](const Where& where) {
      attend(q, k_buf, v_buf, fmt, out, n_heads, n_kv_heads, head_dim, capacity, where, n, scale, window, softcap, int8,
             scratch);
    };
  });
}

// --- system ---

void read_at(int fd, int64_t offset, BytesOut array) {
  const auto size = static_cast<int64_t>(array.size());
  expect(offset >= 0, "offset", 0, offset);
  int64_t got;
  {
    nb::gil_scoped_release release;
    got = read_fully(fd, offset, array.data(), size);
  }
  if (got < 0) {
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
  if (got < size) {
    const auto message = "the file ends after " + text(got) + " of " + text(size) + " bytes at offset " + text(offset);
    PyErr_SetString(PyExc_OSError, message.c_str());
    throw nb::python_error();
  }
}

void populate(BytesOut array) {
  nb::gil_scoped_release release;
  populate_pages(array.data(), array.size());
}

}  // namespace
}  // namespace barefoot

NB_MODULE(_native, m) {
  using namespace barefoot;
  m.doc() = "Compiled kernels of barefoot; barefoot.ops describes them.";

  nb::class_<PackedWeight>(m, "PackedWeight")
      .def(nb::init<const std::string&, int64_t, int64_t, nb::object, const std::string&>(), "format"_a, "rows"_a,
           "cols"_a, "buffer"_a = nb::none(), "layout"_a = "rows")
      .def("bind", &PackedWeight::bind, "buffer"_a.noconvert())
      .def_prop_ro("format", &PackedWeight::format_name)
      .def_prop_ro("layout", &PackedWeight::layout_name)
      .def_prop_ro("rows", &PackedWeight::rows)
      .def_prop_ro("cols", &PackedWeight::cols)
      .def_prop_ro("n_bytes", &PackedWeight::n_bytes)
      .def_prop_ro("buffer", &PackedWeight::buffer);

  nb::class_<SignStack>(m, "SignStack")
      .def(nb::init<int64_t, int64_t, int64_t, nb::sequence>(), "rows"_a, "cols"_a, "rank"_a,
           "buffers"_a = nb::make_tuple())
      .def("bind", &SignStack::bind, "buffers"_a)
      .def_prop_ro("rows", &SignStack::rows)
      .def_prop_ro("cols", &SignStack::cols)
      .def_prop_ro("rank", &SignStack::rank)
      .def_prop_ro("block_bytes", &SignStack::block_bytes)
      .def_prop_ro("buffers", [](const SignStack& stack) { return nb::tuple(nb::cast(stack.buffers())); });

  m.def("matmul", &barefoot::matmul, "x"_a.noconvert(), "weights"_a, "outs"_a, nb::kw_only(), "activations"_a = "int8",
        "add"_a = false, "scratch"_a.noconvert());
  m.def("embed", &barefoot::embed, "ids"_a.noconvert(), "weight"_a, "out"_a.noconvert(), nb::kw_only(),
        "scale"_a = 1.0f);
  m.def("pack_panels", &barefoot::pack_panels, "format"_a, "rows"_a.noconvert(), "n_rows"_a, "n_cols"_a,
        "out"_a.noconvert());
  m.def("pack_lut", &barefoot::pack_lut, "format"_a, "rows"_a.noconvert(), "n_rows"_a, "n_cols"_a,
        "out"_a.noconvert());
  m.def("plane_matmul", &barefoot::plane_matmul, "x"_a.noconvert(), "weight"_a.noconvert(), "out"_a.noconvert(),
        nb::kw_only(), "weight_bits"_a, "group"_a, "zero"_a, "has_minimum"_a, "activation_bits"_a, "add"_a,
        "scratch"_a.noconvert());
  m.def("sign_matmul", &barefoot::sign_matmul, "x"_a.noconvert(), "stack"_a, "out"_a.noconvert(), nb::kw_only(),
        "activations"_a = "int8", "add"_a = false, "scratch"_a.noconvert());
  nb::class_<Part>(m, "Part")
      .def(nb::init<const std::string&, int64_t, int64_t, nb::object>(), "kind"_a, "rows"_a, "cols"_a,
           "buffer"_a = nb::none())
      .def("bind", &Part::bind, "buffer"_a.noconvert())
      .def("unbind", &Part::unbind)
      .def_prop_ro("kind", &Part::name)
      .def_prop_ro("rows", &Part::rows)
      .def_prop_ro("cols", &Part::cols)
      .def_prop_ro("buffer", &Part::buffer);
  m.def("part_matmul", &barefoot::part_matmul, "x"_a.noconvert(), "part"_a, "out"_a.noconvert(), nb::kw_only(),
        "add"_a = false, "scratch"_a.noconvert());
  m.def("rmsnorm", &barefoot::rmsnorm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a, "out"_a.noconvert(),
        nb::kw_only(), "plus_one"_a = false);
  m.def("head_rmsnorm", &barefoot::head_rmsnorm, "x"_a.noconvert(), "n_heads"_a, "head_dim"_a, "weight"_a.noconvert(),
        "eps"_a, nb::kw_only(), "plus_one"_a = false);
  m.def("reorder", &barefoot::reorder, "x"_a.noconvert(), "orders"_a.noconvert());
  m.def("rope", &barefoot::rope, "x"_a.noconvert(), "n_heads"_a, "head_dim"_a, "cos"_a.noconvert(), "sin"_a.noconvert(),
        nb::kw_only(), "interleaved"_a);
  m.def("glu", &barefoot::glu, "gate"_a.noconvert(), "up"_a.noconvert(), "out"_a.noconvert(), nb::kw_only(),
        "activation"_a = "silu");
  m.def("add_", &barefoot::add_, "x"_a.noconvert(), "y"_a.noconvert());
  m.def("argmax", &barefoot::argmax, "logits"_a.noconvert());
  m.def("lowest_before", &barefoot::lowest_before, "scores"_a.noconvert(), "position"_a.noconvert(), "end"_a,
        "out"_a.noconvert());
  m.def("top_k", &barefoot::top_k, "logits"_a.noconvert(), "values"_a.noconvert(), "ids"_a.noconvert());
  m.def("fit_groups", &barefoot::fit_groups, "x"_a.noconvert(), "grid"_a, "importance"_a.noconvert().none(),
        "shrinks"_a.noconvert(), "steps"_a.noconvert(), "n_refits"_a, "params"_a.noconvert());
  m.def("group_errors", &barefoot::group_errors, "x"_a.noconvert(), "grid"_a, "params"_a.noconvert(),
        "importance"_a.noconvert().none(), "errors"_a.noconvert());
  m.def("round_groups", &barefoot::round_groups, "x"_a.noconvert(), "grid"_a, "params"_a.noconvert(),
        "codes"_a.noconvert());
  m.def("encode_groups", &barefoot::encode_groups, "x"_a.noconvert(), "grid"_a, "bits"_a, "is_signed"_a,
        "out"_a.noconvert());
  m.def("feedback_round", &barefoot::feedback_round, "weights"_a.noconvert(), "targets"_a.noconvert(), "grid"_a,
        "params"_a.noconvert(), "groups"_a.noconvert(), "mixing"_a.noconvert(), "codes"_a.noconvert());
  m.def("kv_append", &barefoot::kv_append, "k"_a.noconvert(), "v"_a.noconvert(), "k_buf"_a.noconvert(),
        "v_buf"_a.noconvert(), "fmt"_a, "capacity"_a, "start"_a);
  m.def("attention", &barefoot::attention, "q"_a.noconvert(), "k_buf"_a.noconvert(), "v_buf"_a.noconvert(), "fmt"_a,
        "out"_a.noconvert(), nb::kw_only(), "n_heads"_a, "n_kv_heads"_a, "head_dim"_a, "capacity"_a, "n_past"_a,
        "n_tokens"_a, "scale"_a, "window"_a = 0, "softcap"_a = 0.0f, "activations"_a = "float32",
        "scratch"_a.noconvert());
  m.def("kv_append_each", &barefoot::kv_append_each, "k"_a.noconvert(), "v"_a.noconvert(), "k_buf"_a.noconvert(),
        "v_buf"_a.noconvert(), "fmt"_a, "capacity"_a, "sequences"_a, "positions"_a);
  m.def("attention_each", &barefoot::attention_each, "q"_a.noconvert(), "k_buf"_a.noconvert(), "v_buf"_a.noconvert(),
        "fmt"_a, "out"_a.noconvert(), nb::kw_only(), "n_heads"_a, "n_kv_heads"_a, "head_dim"_a, "capacity"_a,
        "sequences"_a, "positions"_a, "scale"_a, "window"_a = 0, "softcap"_a = 0.0f, "scratch"_a.noconvert());
  nb::class_<Segment>(m, "Segment")
      .def(nb::init<const std::string&, KvBytes, const std::string&, KvBytes, int64_t, int64_t, Counts, int64_t, Extra,
                    Extra, Extra>(),
           "key_format"_a, "keys"_a.noconvert(), "value_format"_a, "values"_a.noconvert(), nb::kw_only(), "key_dim"_a,
           "value_dim"_a, "counts"_a.noconvert(), "group"_a = 32, "bias"_a.noconvert() = nb::none(),
           "key_scale"_a.noconvert() = nb::none(), "value_scale"_a.noconvert() = nb::none())
      .def_prop_ro("stride", &Segment::stride)
      .def_rw("key_start", &Segment::key_start)
      .def_rw("value_start", &Segment::value_start);
  m.def("attend_segment", &barefoot::attend_segment, "q"_a.noconvert(), "segment"_a, "sums"_a.noconvert(),
        "tops"_a.noconvert(), "totals"_a.noconvert(), nb::kw_only(), "n_before"_a = -1, "scale"_a,
        "softcap"_a = 0.0f, "scores"_a.noconvert() = nb::none(), "scratch"_a.noconvert());
  m.def("attention_mass", &barefoot::attention_mass, "scores"_a.noconvert(), "tops"_a.noconvert(),
        "totals"_a.noconvert(), "counts"_a.noconvert(), "mass"_a.noconvert(), nb::kw_only(),
        "thresholds"_a.noconvert() = nb::none());
  m.def("flash_forward", &barefoot::flash_forward, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(),
        "lengths"_a.noconvert(), "out"_a.noconvert(), "lse"_a.noconvert(), nb::kw_only(), "scale"_a, "window"_a = 0,
        "softcap"_a = 0.0f, "scratch"_a.noconvert());
  m.def("flash_backward", &barefoot::flash_backward, "d_out"_a.noconvert(), "q"_a.noconvert(), "k"_a.noconvert(),
        "v"_a.noconvert(), "out"_a.noconvert(), "lse"_a.noconvert(), "lengths"_a.noconvert(), "dq"_a.noconvert(),
        "dk"_a.noconvert(), "dv"_a.noconvert(), nb::kw_only(), "scale"_a, "window"_a = 0, "softcap"_a = 0.0f,
        "scratch"_a.noconvert());
  m.def("kv_write", &barefoot::kv_write, "rows"_a.noconvert(), "buffer"_a.noconvert(), "fmt"_a, "slots"_a.noconvert());
  nb::class_<Program>(m, "Program")
      .def(nb::init<>())
      .def("matmul", &record_matmul, "x"_a.noconvert(), "weights"_a, "outs"_a, nb::kw_only(), "activations"_a = "int8",
           "add"_a = false, "scratch"_a.noconvert())
      .def("sign_matmul", &record_sign_matmul, "x"_a.noconvert(), "stack"_a, "out"_a.noconvert(), nb::kw_only(),
           "activations"_a = "int8", "add"_a = false, "scratch"_a.noconvert())
      .def("part_matmul", &record_part_matmul, "x"_a.noconvert(), "part"_a, "out"_a.noconvert(), nb::kw_only(),
           "add"_a = false, "scratch"_a.noconvert())
      .def("rmsnorm", &record_rmsnorm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a, "out"_a.noconvert(),
           nb::kw_only(), "plus_one"_a = false)
      .def("head_rmsnorm", &record_head_rmsnorm, "x"_a.noconvert(), "n_heads"_a, "head_dim"_a, "weight"_a.noconvert(),
           "eps"_a, nb::kw_only(), "plus_one"_a = false)
      .def("rope", &record_rope, "x"_a.noconvert(), "n_heads"_a, "head_dim"_a, "cos"_a.noconvert(),
           "sin"_a.noconvert(), nb::kw_only(), "interleaved"_a)
      .def("reorder", &record_reorder, "x"_a.noconvert(), "orders"_a.noconvert())
      .def("glu", &record_glu, "gate"_a.noconvert(), "up"_a.noconvert(), "out"_a.noconvert(), nb::kw_only(),
           "activation"_a = "silu")
      .def("add_", &record_add, "x"_a.noconvert(), "y"_a.noconvert())
      .def("kv_append", &record_kv_append, "k"_a.noconvert(), "v"_a.noconvert(), "k_buf"_a.noconvert(),
           "v_buf"_a.noconvert(), "fmt"_a, "capacity"_a)
      .def("attention", &record_attention, "q"_a.noconvert(), "k_buf"_a.noconvert(), "v_buf"_a.noconvert(), "fmt"_a,
           "out"_a.noconvert(), nb::kw_only(), "n_heads"_a, "n_kv_heads"_a, "head_dim"_a, "capacity"_a, "scale"_a,
           "window"_a = 0, "softcap"_a = 0.0f, "activations"_a = "float32", "scratch"_a.noconvert())
      .def("run", &Program::run, "n_tokens"_a, "n_past"_a, "sequence"_a = 0)
      .def("run_each", &Program::run_each, "sequences"_a, "positions"_a);

  m.def("read_at", &barefoot::read_at, "fd"_a, "offset"_a, "array"_a.noconvert());
  m.def("populate", &barefoot::populate, "array"_a.noconvert());

  m.def("use_openmp", [](uintptr_t parallel) { use_openmp(reinterpret_cast<Openmp>(parallel)); }, "parallel"_a);
  m.def("set_threads", &set_threads, "n"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : isas()) names.emplace_back(isa.name);
    return names;
  });
  m.def("isa", [] { return chosen().name; });
  m.def("set_isa", [](const std::string& name) {
    for (const Isa& isa : isas())
      if (name == isa.name) return void(chosen() = isa);
    refuse("no " + name + " kernels here");
  });
  m.def("formats", [] {
    std::vector<std::string> lines;  // name, block elements, block bytes: compared with blocks.py by a test
    for (int i = 0; i < portable::kernels.n_formats; ++i) {
      const FormatInfo& f = portable::kernels.formats[i];
      lines.push_back(std::string(f.name) + " " + text(f.block_elements) + " " + text(f.block_bytes));
    }
    return lines;
  });
}
