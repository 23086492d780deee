// Operators of domain `scalefold` for onnxruntime's CPU: what scalefold's integer graphs compute, with the float steps
// around each product fused into it. `passes/fuse_kernels.py` writes them, `compiler/kernel_library.py` builds this file.
//
//   Linear             y = act((x - z) W s_x s_w + b) + r          x uint8 [..., K], y float [..., N]
//   LinearUint8        the same without r, quantized to uint8
//   LinearBfloat16     the same without r, as bfloat16
//   LinearNormUint8    h = LayerNormalization(Linear(...)); (h m + a, quantize(h))
//   LayerNormUint8     h = LayerNormalization(x); (h m + a, quantize(h))
//   AttentionUint8     softmax(q k^T / sqrt(D) + mask) v, quantized; q, k, v side by side in one bfloat16 [B, S, 3 H D]
//   RowLinear          Linear of float rows that are brought to codes on the way in: normalized, gated, or as they are; by
//                      one step for all, or each row by its own range
//   FloatLinear        the same product of a layer that no integers hold: rows and weight in bfloat16, sums in float
//   LookUp             rows of a table that is stored as the weight of a Linear, times their scales
//   CachedAttention    attention of new tokens behind a cache, and behind what stands in front of every cache; rotated where
//                      there are angles; and the cache with them
//   AddNorm            x = a + b; (x, LayerNormalization(x) or RMSNormalization(x))
//   GatedSilu          silu(x[..., :N]) x[..., N:]
//
// W is stored in panels of 64 columns, [ceil(N/64), K/4, 64, 4] int8, which is how the instruction vpdpbusd reads it: no
// copy is made when a session opens. Where a last input has its levels, it is stored as codes of 4 bits instead; see Coded.
// There is a path for AVX512-VNNI and a plain one for every other CPU; integer sums are the same numbers in both.

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#if defined(__x86_64__) && !defined(SCALEFOLD_PLAIN)
#include <immintrin.h>
#define HAS_AVX512 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The part of onnxruntime's C interface that is used here. Its table of functions only ever grows at its end, so each is
// called by its place in it (API version 17, onnxruntime 1.17).

namespace ort {

struct Status;
struct Value;
struct Context;
struct Info;
struct Options;
struct Domain;
struct Shape;
constexpr uint32_t kVersion = 17;
enum Type { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kBfloat16 = 16 };
enum Code { kInvalidArgument = 2 };

using Table = void* const*;
struct Base {
  Table (*get_api)(uint32_t version);
  const char* (*version)();
};

template <typename Result, typename... Arguments>
Result call(Table api, int place, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(api[place])(arguments...);
}

inline Status* fault(Table api, const std::string& message) {
  return call<Status*>(api, 0, static_cast<int>(kInvalidArgument), message.c_str());
}

struct CustomOp {
  uint32_t version;
  void* (*create_first)(const CustomOp*, Table, const Info*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*inputs)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*outputs)(const CustomOp*);
  void (*compute_first)(void*, Context*);
  void (*destroy)(void*);
  int (*input_kind)(const CustomOp*, size_t);
  int (*output_kind)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_inputs)(const CustomOp*);
  int (*variadic_input_kind)(const CustomOp*);
  int (*variadic_outputs)(const CustomOp*);
  int (*variadic_output_kind)(const CustomOp*);
  Status* (*create)(const CustomOp*, Table, const Info*, void**);
  Status* (*compute)(void*, Context*);
  void* infer_shape;
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
  void* in_place[4];
};

}  // namespace ort

namespace {

using ort::Table;

// Memory for `count` elements that a thread keeps. It never shrinks: what grows again is filled with zeros first.
template <typename T>
T* at_least(std::vector<T>& room, size_t count) {
  if (room.size() < count) room.resize(count);
  return room.data();
}

struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> shape;

  explicit operator bool() const { return data != nullptr; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  size_t size() const {
    size_t product = 1;
    for (const int64_t dim : shape) product *= static_cast<size_t>(dim);
    return product;
  }
  size_t last() const { return shape.empty() ? 1 : static_cast<size_t>(shape.back()); }
  size_t rows() const { return last() ? size() / last() : 0; }
};

// One run of a node: its tensors and the threads of the session.
class Run {
 public:
  Run(Table api, ort::Context* context) : api_(api), context_(context) {
    ort::call<ort::Status*>(api_, 88, context_, &inputs_);
  }

  Tensor input(size_t index) const {
    Tensor tensor;
    const ort::Value* value = nullptr;
    if (index >= inputs_) return tensor;
    ort::call<ort::Status*>(api_, 90, context_, index, &value);
    if (value != nullptr) fill(value, tensor);
    return tensor;
  }

  Tensor output(size_t index, const std::vector<int64_t>& shape) const {
    Tensor tensor;
    ort::Value* value = nullptr;
    ort::call<ort::Status*>(api_, 91, context_, index, shape.data(), shape.size(), &value);
    tensor.shape = shape;
    if (value != nullptr) ort::call<ort::Status*>(api_, 51, value, &tensor.data);
    return tensor;
  }

  // Call work(task) for every task below `tasks`, in order within `batches` stretches that threads take in turn.
  template <typename Work>
  void parallel(size_t tasks, size_t batches, const Work& work) const {
    if (tasks == 0) return;
    if (tasks == 1) return work(0);
    void (*each)(void*, size_t) = [](void* given, size_t task) { (*static_cast<const Work*>(given))(task); };
    ort::call<ort::Status*>(api_, 274, context_, each, tasks, std::min(tasks, batches),
                            static_cast<void*>(const_cast<Work*>(&work)));
  }

  ort::Status* fault(const std::string& message) const { return ort::fault(api_, message); }

 private:
  void fill(const ort::Value* value, Tensor& tensor) const {
    ort::Shape* shape = nullptr;
    size_t rank = 0;
    ort::call<ort::Status*>(api_, 51, value, &tensor.data);
    ort::call<ort::Status*>(api_, 65, value, &shape);
    ort::call<ort::Status*>(api_, 61, shape, &rank);
    tensor.shape.resize(rank);
    ort::call<ort::Status*>(api_, 62, shape, tensor.shape.data(), rank);
    ort::call<void>(api_, 99, shape);
  }

  Table api_;
  ort::Context* context_;
  size_t inputs_ = 0;
};

constexpr size_t kWidth = 64;       // columns of a panel
constexpr size_t kTileRows = 6;     // rows of a tile: 6 x 4 sums of 16 columns fill the registers
constexpr size_t kStretches = 64;   // stretches that the tasks of a large node are handed out in

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// What becomes of the sums of a product.
struct Finish {
  const int32_t* sums;        // [N] sum of each column of W
  const float* scales;        // [N]
  const float* bias;          // [N]
  const float* residual;      // [M, N] or null
  const float* row_steps;     // [M], each row's own step, and then its least value; or null: x_scale and x_zero for all
  const float* row_lows;      // [M]
  float x_scale;
  int32_t x_zero;
  Activation activation;
  float* out_float;           // [M - out_first, N] or null
  size_t out_first;           // the row that out_float begins with
  uint16_t* out_bfloat;       // [M, N] or null
  uint8_t* out_codes;         // [M, N] or null
  float inverse;              // 1 / step of out_codes
  int32_t zero;
  size_t n;
};

constexpr size_t kBlock = 32;      // rows of a block of codes
constexpr size_t kVectors = 16;    // vectors of 64 bytes of such a block in a panel
constexpr size_t kLevels = 16;     // levels that 4 bits tell apart

// A weight as codes of 4 bits, panels [ceil(N/64), K/32, 16, 64] of two codes a byte. Vector 4 q + i of a block has columns
// 16 q + 4 l + i, l < 4, 16 bytes each; byte r has row r of the block in its lower half and row 16 + r in its upper one.
// K rows are `groups` of equal size, and a code stands for
//   (code - 8) levels[panel, group, column]                                              levels [panels, groups, 64]
//   levels[panel, group, vector, 16 l + code]         its own 16 values for a column,    levels [panels, groups, 16, 64]
struct Coded {
  const uint8_t* codes;
  const int8_t* levels;
  size_t groups;
  bool tables;
};

struct Product {
  const uint8_t* x;
  const int8_t* weight;  // or null: coded
  Coded coded;
  size_t m, k;
  Finish finish;
};

inline uint8_t to_code(float value, float inverse, int32_t zero) {
  const float code = std::nearbyint(value * inverse) + static_cast<float>(zero);
  return static_cast<uint8_t>(std::min(255.0f, std::max(0.0f, code)));
}

inline uint16_t to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return std::max(x, 0.0f);
    case Activation::kGelu:
      return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::kSilu:
      return x / (1.0f + std::exp(-x));
    default:
      return x;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Any CPU.

// The 16 values of each column of a panel, in the order of the codes, from its steps.
void stepped_plain(const int8_t* steps, int8_t* values) {
  for (size_t v = 0; v < kVectors; ++v)
    for (size_t l = 0; l < 4; ++l)
      for (int code = 0; code < static_cast<int>(kLevels); ++code)
        values[v * 64 + l * kLevels + code] = static_cast<int8_t>((code - 8) * steps[v / 4 * 16 + 4 * l + v % 4]);
}

// The values of a panel in one group of rows, which `room` is for where they are not stored.
template <typename Stepped>
const int8_t* values_of(const Coded& c, size_t panel, size_t group, int8_t* room, const Stepped& stepped) {
  const size_t at = panel * c.groups + group;
  if (c.tables) return c.levels + at * kVectors * 64;
  stepped(c.levels + at * kWidth, room);
  return room;
}

// A panel of codes as int8 [K/4, 64, 4].
void decode_plain(const Product& p, size_t panel, int8_t* out) {
  const Coded& c = p.coded;
  const size_t blocks = p.k / kBlock;
  int8_t room[kVectors * 64];
  const int8_t* values = nullptr;
  for (size_t b = 0; b < blocks; ++b) {
    if (b % (blocks / c.groups) == 0) values = values_of(c, panel, b / (blocks / c.groups), room, stepped_plain);
    const uint8_t* codes = c.codes + (panel * blocks + b) * kVectors * 64;
    for (size_t at = 0; at < kVectors * 64; ++at) {
      const size_t v = at / 64, l = at % 64 / 16, r = at % 16, column = v / 4 * 16 + 4 * l + v % 4;
      int8_t* to = out + (b * kBlock + r - r % 4) * kWidth + column * 4 + r % 4;
      to[0] = values[v * 64 + l * kLevels + (codes[at] & 15)];
      to[16 * kWidth] = values[v * 64 + l * kLevels + (codes[at] >> 4)];
    }
  }
}

// Rows of a panel whose weight is given as int8 [K/4, 64, 4].
void tile_plain(const Product& p, size_t row, size_t rows, size_t panel, const int8_t* weight) {
  const Finish& f = p.finish;
  const size_t first = panel * kWidth, columns = std::min(kWidth, f.n - first);
  for (size_t i = row; i < row + rows; ++i) {
    int32_t sums[kWidth] = {};
    for (size_t k = 0; k < p.k; k += 4) {
      const uint8_t* x = p.x + i * p.k + k;
      const int8_t* w = weight + k * kWidth;
      for (size_t j = 0; j < kWidth; ++j)
        sums[j] += x[0] * w[4 * j] + x[1] * w[4 * j + 1] + x[2] * w[4 * j + 2] + x[3] * w[4 * j + 3];
    }
    for (size_t j = 0; j < columns; ++j) {
      const size_t at = first + j, to = i * f.n + at;
      const float sum = f.row_steps ? static_cast<float>(sums[j]) * f.row_steps[i] + f.row_lows[i] * static_cast<float>(f.sums[at])
                                    : static_cast<float>(sums[j] - f.x_zero * f.sums[at]) * f.x_scale;
      const float y = activate(sum * f.scales[at] + f.bias[at], f.activation);
      if (f.out_codes) f.out_codes[to] = to_code(y, f.inverse, f.zero);
      if (f.out_bfloat) f.out_bfloat[to] = to_bfloat(y);
      if (f.out_float) f.out_float[to - f.out_first * f.n] = f.residual ? y + f.residual[to] : y;
    }
  }
}

// A product of bfloat16; W in panels [ceil(N/64), K/2, 64, 2].
struct FloatProduct {
  const uint32_t* x;       // [M, K/2], pairs of bfloat16
  const uint32_t* weight;  // pairs along K
  const float* bias;       // [N]
  const float* residual;   // [M, N] or null
  float* out;              // [M, N]
  size_t m, pairs, n;
  Activation activation;
};

void float_tile_plain(const FloatProduct& p, size_t row, size_t rows, size_t panel) {
  const auto part = [](uint32_t pair, int half) { return from_bfloat(static_cast<uint16_t>(pair >> 16 * half)); };
  const uint32_t* weight = p.weight + panel * kWidth * p.pairs;
  const size_t first = panel * kWidth, columns = std::min(kWidth, p.n - first);
  for (size_t i = row; i < row + rows; ++i) {
    const uint32_t* x = p.x + i * p.pairs;
    for (size_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (size_t k = 0; k < p.pairs; ++k)
        for (const int half : {0, 1}) sum += part(x[k], half) * part(weight[k * kWidth + j], half);
      const size_t at = first + j, to = i * p.n + at;
      const float y = activate(sum + p.bias[at], p.activation);
      p.out[to] = p.residual ? y + p.residual[to] : y;
    }
  }
}

// A normalization: what it multiplies by, and where its results go.
struct Norm {
  const float *gain, *shift, *multiply, *add;  // [N]
  float epsilon, inverse;
  int32_t zero;
  size_t n;
  float* out;      // [M, N]
  uint8_t* codes;  // [M, N]
};

// What brings a row to mean 0, or leaves its mean where it is not to be centred, and to a mean square of 1.
struct Moments {
  float mean, scale;
};

Moments moments_plain(const float* x, size_t n, bool centred, float epsilon) {
  double sum = 0, squares = 0;
  for (size_t i = 0; i < n; ++i) sum += x[i];
  const float mean = centred ? static_cast<float>(sum / static_cast<double>(n)) : 0.0f;
  for (size_t i = 0; i < n; ++i) squares += static_cast<double>(x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(n)) + epsilon)};
}

void normalize_plain(const Norm& f, size_t row, const float* x) {
  const Moments m = moments_plain(x, f.n, true, f.epsilon);
  for (size_t i = 0; i < f.n; ++i) {
    const float y = (x[i] - m.mean) * m.scale * f.gain[i] + f.shift[i];
    f.codes[row * f.n + i] = to_code(y, f.inverse, f.zero);
    f.out[row * f.n + i] = y * f.multiply[i] + f.add[i];
  }
}

// Attention of one head for query rows [first, last). A row whose every key is masked by the lowest float or by minus
// infinity gives zero, as onnxruntime's operator has it.
struct Head {
  const uint16_t *q, *k, *v;  // bfloat16, rows `stride` apart
  const float* mask;          // row of the first query, or null; rows `mask_stride` apart (0: the same for all)
  size_t stride, mask_stride, keys, size, first, last;
  float scale;
  uint8_t* out;             // rows `out_stride` apart, or null
  float* out_float;         // the same, not quantized, where `out` is null
  size_t out_stride;
  float inverse;
  int32_t zero;
};

void attend_plain(const Head& h, std::vector<uint32_t>& scratch) {
  float *scores = reinterpret_cast<float*>(at_least(scratch, h.keys + h.size)), *sums = scores + h.keys;
  for (size_t i = h.first; i < h.last; ++i) {
    float largest = -FLT_MAX, total = 0;
    for (size_t j = 0; j < h.keys; ++j) {
      float score = 0;
      for (size_t d = 0; d < h.size; ++d) score += from_bfloat(h.q[i * h.stride + d]) * from_bfloat(h.k[j * h.stride + d]);
      scores[j] = std::max(-FLT_MAX, score * h.scale + (h.mask ? h.mask[i * h.mask_stride + j] : 0.0f));
      largest = std::max(largest, scores[j]);
    }
    std::fill(sums, sums + h.size, 0.0f);
    if (largest == -FLT_MAX) total = INFINITY;
    for (size_t j = 0; j < h.keys; ++j) {
      const float share = from_bfloat(to_bfloat(std::exp(scores[j] - largest)));
      total += share;
      for (size_t d = 0; d < h.size; ++d) sums[d] += share * from_bfloat(h.v[j * h.stride + d]);
    }
    for (size_t d = 0; d < h.size; ++d) {
      if (h.out) h.out[i * h.out_stride + d] = to_code(sums[d] / total, h.inverse, h.zero);
      if (h.out_float) h.out_float[i * h.out_stride + d] = sums[d] / total;
    }
  }
}

// Keys or values of one head: `count` rows in front, and those behind.
template <typename Number>
struct Rows {
  const Number *front, *behind;
  size_t count, stride;

  const Number* operator()(size_t row) const {
    return row < count ? front + row * stride : behind + (row - count) * stride;
  }
};

// Attention of S new tokens behind P in a cache, T = P + S; H heads of D share G heads of keys and values.
struct Cached {
  const float *qkv;               // [B, S, (H + 2 G) D]
  const float *past_k, *past_v;   // [B, G, P, D]
  const float *front_k, *front_v; // [G, F, D], of every sequence, rounded to bfloat16; or null
  const float *cosines, *sines;   // [B, S, D / 2], or null
  const float* mask;              // of the first query of a head
  size_t mask_strides[3];         // by batch, head and query; 0 where it is the same for all
  float *k, *v;                   // [B, G, T, D]
  float* out;                     // [B, S, H D]
  size_t batch, tokens, past, front, heads, groups, size;
  float scale;

  size_t grown() const { return past + tokens; }
  size_t total() const { return front + grown(); }
  size_t width() const { return (heads + 2 * groups) * size; }
  Rows<float> rows(const float* all, const float* in_front, size_t b, size_t g) const {
    return {in_front + g * front * size, all + (b * groups + g) * grown() * size, front, size};
  }
  Rows<float> keys(size_t b, size_t g) const { return rows(k, front_k, b, g); }
  Rows<float> values(size_t b, size_t g) const { return rows(v, front_v, b, g); }
  const float* mask_row(size_t b, size_t head, size_t query) const {
    return mask + b * mask_strides[0] + head * mask_strides[1] + query * mask_strides[2];
  }
};

void rotate_plain(const float* x, const float* cosines, const float* sines, size_t half, float* out) {
  for (size_t d = 0; d < half; ++d) {
    const float a = x[d], b = x[half + d];
    out[d] = a * cosines[d] - b * sines[d];
    out[half + d] = b * cosines[d] + a * sines[d];
  }
}

void round_plain(const float* x, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = from_bfloat(to_bfloat(x[i]));
}

void to_bfloats_plain(const float* x, size_t n, uint16_t* out) {
  for (size_t i = 0; i < n; ++i) out[i] = to_bfloat(x[i]);
}

// One query by numbers that are rounded to bfloat16, as a prompt is multiplied in: both give the same but for the order in
// which floats are added.
void attend_row_plain(const float* q, const Rows<float>& k, const Rows<float>& v, size_t keys, size_t size, float scale,
                      const float* mask, float* scores, float* out) {
  float largest = -FLT_MAX, total = 0;
  for (size_t j = 0; j < keys; ++j) {
    float score = 0;
    for (size_t d = 0; d < size; ++d) score += q[d] * k(j)[d];
    scores[j] = std::max(-FLT_MAX, score * scale + mask[j]);
    largest = std::max(largest, scores[j]);
  }
  std::fill(out, out + size, 0.0f);
  if (largest == -FLT_MAX) total = INFINITY;
  for (size_t j = 0; j < keys; ++j) {
    const float share = from_bfloat(to_bfloat(std::exp(scores[j] - largest)));
    total += share;
    for (size_t d = 0; d < size; ++d) out[d] += share * v(j)[d];
  }
  for (size_t d = 0; d < size; ++d) out[d] /= total;
}

// A sum of two values and its normalization; of `a` alone where `b` is null.
struct Joint {
  const float *a, *b, *gain, *shift;  // shift is null for RMSNormalization
  float epsilon;
  size_t n;
  float* sum;
};

void add_norm_plain(const Joint& f, size_t row, float* out) {
  const float* a = f.a + row * f.n;
  const float* sum = f.b ? f.sum + row * f.n : a;
  for (size_t i = 0; i < f.n && f.b; ++i) f.sum[row * f.n + i] = a[i] + f.b[row * f.n + i];
  const Moments m = moments_plain(sum, f.n, f.shift != nullptr, f.epsilon);
  for (size_t i = 0; i < f.n; ++i) out[i] = (sum[i] - m.mean) * m.scale * f.gain[i] + (f.shift ? f.shift[i] : 0.0f);
}

// A row to codes; where it is to have its own range, (step, least value) are that.
struct Codes {
  bool own_range;
  float inverse;
  int32_t zero;
};

constexpr float kSmallest = 1e-30f;
constexpr float kMasked = -1e30f;  // what a mask adds to keys that are not seen is below

void encode_plain(const Codes& c, const float* x, size_t n, uint8_t* codes, float& step, float& low) {
  float inverse = c.inverse;
  int32_t zero = c.zero;
  low = 0;
  if (c.own_range) {
    float high = low = x[0];
    for (size_t i = 1; i < n; ++i) low = std::min(low, x[i]), high = std::max(high, x[i]);
    const float span = std::max(high - low, kSmallest);
    inverse = 255.0f / span;
    step = span / 255.0f;
    zero = 0;
  }
  for (size_t i = 0; i < n; ++i) codes[i] = to_code(x[i] - low, inverse, zero);
}

// A row of a table in panels, times its scale.
void look_up_plain(const int8_t* panels, size_t k, size_t row, float scale, float* out) {
  const int8_t* from = panels + row / kWidth * kWidth * k + row % kWidth * 4;
  for (size_t i = 0; i < k; i += 4)
    for (size_t j = 0; j < 4; ++j) out[i + j] = static_cast<float>(from[i * kWidth + j]) * scale;
}

// Where the codes of one row of a table lie in each block of its columns, and what they stand for there.
struct CodedRow {
  const Coded& c;
  size_t panel, column, v, l, blocks;

  CodedRow(const Coded& coded, size_t k, size_t row)
      : c(coded), panel(row / kWidth), column(row % kWidth), v(column / 16 * 4 + column % 4), l(column % 16 / 4),
        blocks(k / kBlock) {}

  const uint8_t* codes(size_t block) const { return c.codes + ((panel * blocks + block) * kVectors + v) * 64 + l * 16; }
  void values(size_t block, int32_t* levels) const {
    const size_t at = panel * c.groups + block / (blocks / c.groups);
    for (size_t code = 0; code < kLevels; ++code)
      levels[code] = c.tables ? c.levels[(at * kVectors + v) * 64 + l * kLevels + code]
                              : (static_cast<int>(code) - 8) * c.levels[at * kWidth + column];
  }
};

// The same of a table in codes.
void look_up_coded_plain(const Coded& c, size_t k, size_t row, float scale, float* out) {
  const CodedRow from(c, k, row);
  int32_t levels[kLevels];
  for (size_t b = 0; b < from.blocks; ++b, out += kBlock) {
    if (b % (from.blocks / c.groups) == 0) from.values(b, levels);
    const uint8_t* codes = from.codes(b);
    for (size_t r = 0; r < 16; ++r) {
      out[r] = static_cast<float>(levels[codes[r] & 15]) * scale;
      out[16 + r] = static_cast<float>(levels[codes[r] >> 4]) * scale;
    }
  }
}

void gate_plain(const float* x, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = activate(x[i], Activation::kSilu) * x[n + i];
}

// ---------------------------------------------------------------------------------------------------------------------
// AVX512-VNNI.

#if HAS_AVX512

// e^x to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, and Taylor's polynomial for e^r.
AVX512 inline __m512 exp512(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-104.0f)), _mm512_set1_ps(88.7f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

AVX512 inline __m512 reciprocal512(__m512 x) {
  const __m512 near = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(near, _mm512_fnmadd_ps(x, near, _mm512_set1_ps(2.0f)));
}

AVX512 inline __m512 sigmoid512(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return reciprocal512(_mm512_add_ps(one, exp512(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// x Phi(x). Phi(x) - 1/2 is x times a quotient of polynomials in x^2 that was fitted on [-5.2, 5.2], with an error of at
// most 1e-7; beyond, Phi is 0 or 1 to that error.
AVX512 inline __m512 gelu512(__m512 x) {
  const __m512 limit = _mm512_set1_ps(5.2f);
  const __m512 z = _mm512_max_ps(_mm512_min_ps(x, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
  const __m512 square = _mm512_mul_ps(z, z);
  __m512 p = _mm512_set1_ps(-1.6161989e-8f), q = _mm512_set1_ps(1.3829698e-4f);
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(5.3733297e-6f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(4.1172252e-4f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(6.0802014e-3f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(6.0270078e-2f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(0.39894176f));
  q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(3.2529647e-3f));
  q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(4.3212816e-2f));
  q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(0.31773248f));
  q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(1.0f));
  return _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(z, p), reciprocal512(q), _mm512_set1_ps(0.5f)));
}

AVX512 inline __m512 activate512(__m512 x, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return _mm512_max_ps(x, _mm512_setzero_ps());
    case Activation::kGelu:
      return gelu512(x);
    case Activation::kGeluTanh: {
      const __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
      return _mm512_mul_ps(x, sigmoid512(_mm512_mul_ps(_mm512_mul_ps(x, inner), _mm512_set1_ps(1.59576912f))));
    }
    case Activation::kSilu:
      return _mm512_mul_ps(x, sigmoid512(x));
    default:
      return x;
  }
}

// Bits of floats rounded to bfloat16, in the upper halves; the lower ones are not cleared.
AVX512 inline __m512i rounded512(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
}

AVX512 inline __m256i bfloats512(__m512 x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded512(x), 16)); }

AVX512 inline __m128i codes512(__m512 x, __m512 inverse, __m512i zero) {
  const __m512 scaled = _mm512_min_ps(_mm512_mul_ps(x, inverse), _mm512_set1_ps(512.0f));  // beyond 2^31 there is no integer
  const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), zero);
  return _mm512_cvtusepi32_epi8(_mm512_max_epi32(code, _mm512_setzero_si512()));
}

// Columns [first, first + 64) of row i, from its integer sums.
AVX512 inline void finish512(const Finish& f, size_t i, const int32_t* sums, size_t first) {
  const bool by_row = f.row_steps != nullptr;
  const __m512 scale = _mm512_set1_ps(by_row ? f.row_steps[i] : f.x_scale), low = _mm512_set1_ps(by_row ? f.row_lows[i] : 0.0f);
  const __m512i x_zero = _mm512_set1_epi32(by_row ? 0 : f.x_zero);
  for (size_t at = first; at < first + kWidth && at < f.n; at += 16, sums += 16) {
    const size_t left = f.n - at, to = i * f.n + at;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m512i columns = _mm512_maskz_loadu_epi32(mask, f.sums + at);
    const __m512i centred = _mm512_sub_epi32(_mm512_loadu_si512(sums), _mm512_mullo_epi32(x_zero, columns));
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(centred), scale);
    if (by_row) y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(columns), low, y);
    y = _mm512_fmadd_ps(y, _mm512_maskz_loadu_ps(mask, f.scales + at), _mm512_maskz_loadu_ps(mask, f.bias + at));
    y = activate512(y, f.activation);
    if (f.out_codes)
      _mm_mask_storeu_epi8(f.out_codes + to, mask, codes512(y, _mm512_set1_ps(f.inverse), _mm512_set1_epi32(f.zero)));
    if (f.out_bfloat) _mm256_mask_storeu_epi16(f.out_bfloat + to, mask, bfloats512(y));
    if (f.out_float) {
      if (f.residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, f.residual + to));
      _mm512_mask_storeu_ps(f.out_float + to - f.out_first * f.n, mask, y);
    }
  }
}

// sum + x w for fours of bytes. The instruction is written out because compilers keep copies of the sums in memory otherwise.
AVX512 inline void add_fours512(__m512i& sum, __m512i x, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

// ROWS rows of a panel.
#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5)
template <size_t ROWS>
AVX512 void tile512(const Product& p, size_t row, size_t panel, const int8_t* weight) {
  const uint8_t* x = p.x + row * p.k;
  alignas(64) int32_t sums[ROWS][kWidth];
#define START(i) __m512i s##i##0 = _mm512_setzero_si512(), s##i##1 = s##i##0, s##i##2 = s##i##0, s##i##3 = s##i##0;
  EACH_ROW(START)
  for (size_t k = 0; k < p.k; k += 4, weight += 4 * kWidth) {
    const __m512i w0 = _mm512_loadu_si512(weight), w1 = _mm512_loadu_si512(weight + 64);
    const __m512i w2 = _mm512_loadu_si512(weight + 128), w3 = _mm512_loadu_si512(weight + 192);
#define STEP(i)                                    \
  if constexpr (ROWS > i) {                        \
    int32_t bytes;                                 \
    std::memcpy(&bytes, x + i * p.k + k, 4);       \
    const __m512i four = _mm512_set1_epi32(bytes); \
    add_fours512(s##i##0, four, w0);               \
    add_fours512(s##i##1, four, w1);               \
    add_fours512(s##i##2, four, w2);               \
    add_fours512(s##i##3, four, w3);               \
  }
    EACH_ROW(STEP)
  }
#define STORE(i)                                   \
  if constexpr (ROWS > i) {                        \
    _mm512_store_si512(sums[i], s##i##0);          \
    _mm512_store_si512(sums[i] + 16, s##i##1);     \
    _mm512_store_si512(sums[i] + 32, s##i##2);     \
    _mm512_store_si512(sums[i] + 48, s##i##3);     \
  }
  EACH_ROW(STORE)
#undef START
#undef STEP
#undef STORE
  for (size_t i = 0; i < ROWS; ++i) finish512(p.finish, row + i, sums[i], panel * kWidth);
}

// The lower or upper codes of a vector, or what they stand for.
template <bool TABLES>
AVX512 inline __m512i half512(__m512i codes, bool upper, const int8_t* values) {
  const __m512i half = _mm512_and_si512(upper ? _mm512_srli_epi16(codes, 4) : codes, _mm512_set1_epi8(15));
  return TABLES ? _mm512_shuffle_epi8(_mm512_loadu_si512(values), half) : half;
}

AVX512 void stepped512(const int8_t* steps, int8_t* values) {
  alignas(64) static constexpr int16_t kRamp[32] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7,
                                                    -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  const __m512i lanes = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);  // 0 and 1, in steps of 4
  for (size_t v = 0; v < kVectors; ++v) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(steps + v / 4 * 16));
    const __m512i each = _mm512_castsi256_si512(_mm256_cvtepi8_epi16(bytes));
    for (size_t half = 0; half < 2; ++half) {
      const __m512i chosen = _mm512_add_epi16(lanes, _mm512_set1_epi16(static_cast<int16_t>(v % 4 + 8 * half)));
      const __m512i products = _mm512_mullo_epi16(_mm512_permutexvar_epi16(chosen, each), _mm512_load_si512(kRamp));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + v * 64 + 32 * half), _mm512_cvtepi16_epi8(products));
    }
  }
}

AVX512 void decode512(const Product& p, size_t panel, int8_t* out) {
  const Coded& c = p.coded;
  const size_t blocks = p.k / kBlock;
  const uint8_t* codes = c.codes + panel * blocks * kVectors * 64;
  int8_t room[kVectors * 64];
  const int8_t* values = nullptr;
  for (size_t b = 0; b < blocks; ++b) {
    if (b % (blocks / c.groups) == 0) values = values_of(c, panel, b / (blocks / c.groups), room, stepped512);
    for (size_t q = 0; q < 4; ++q, codes += 256) {
      for (const bool upper : {false, true}) {
        __m512i v[4];
        for (size_t i = 0; i < 4; ++i)
          v[i] = half512<true>(_mm512_loadu_si512(codes + 64 * i), upper, values + (4 * q + i) * 64);
        const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), e = _mm512_unpacklo_epi32(v[2], v[3]);
        const __m512i d = _mm512_unpackhi_epi32(v[0], v[1]), f = _mm512_unpackhi_epi32(v[2], v[3]);
        int8_t* to = out + (b * kBlock + (upper ? 16 : 0)) * kWidth + q * 64;
        _mm512_storeu_si512(to, _mm512_unpacklo_epi64(a, e));
        _mm512_storeu_si512(to + 4 * kWidth, _mm512_unpackhi_epi64(a, e));
        _mm512_storeu_si512(to + 8 * kWidth, _mm512_unpacklo_epi64(d, f));
        _mm512_storeu_si512(to + 12 * kWidth, _mm512_unpackhi_epi64(d, f));
      }
    }
  }
}

AVX512 void look_up_coded512(const Coded& c, size_t k, size_t row, float scale, float* out) {
  const CodedRow from(c, k, row);
  alignas(64) int32_t levels[kLevels];
  __m512 values = _mm512_setzero_ps();
  for (size_t b = 0; b < from.blocks; ++b, out += kBlock) {
    if (b % (from.blocks / c.groups) == 0) {
      from.values(b, levels);
      values = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(levels)), _mm512_set1_ps(scale));
    }
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from.codes(b))));
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(codes, values));  // which reads the lower 4 bits alone
    _mm512_storeu_ps(out + 16, _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values));
  }
}

// The sums of 16 columns in their order, from four vectors that have four parts of each.
AVX512 inline __m512i across512(const __m512i* s) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

AVX512 inline __m512i sixteen512(const uint8_t* x) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// One row by a panel of codes, which are multiplied as they are read: half the bytes of the same product of int8.
template <bool TABLES>
AVX512 void coded_row512(const Product& p, size_t row, size_t panel) {
  const Coded& c = p.coded;
  const size_t blocks = p.k / kBlock, each = blocks / c.groups;
  const uint8_t *codes = c.codes + panel * blocks * kVectors * 64, *x = p.x + row * p.k;
  const int8_t* levels = c.levels + panel * c.groups * (TABLES ? kVectors * 64 : kWidth);
  __m512i s[kVectors], totals[4];
  for (size_t q = 0; q < 4; ++q) totals[q] = _mm512_setzero_si512();
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) s[v] = _mm512_setzero_si512();
  for (size_t g = 0; g < c.groups; ++g, levels += TABLES ? kVectors * 64 : kWidth) {
    if constexpr (!TABLES) {
      __m512i eights = _mm512_setzero_si512();
      for (size_t k = 0; k < each * kBlock; k += 16) add_fours512(eights, sixteen512(x + k), _mm512_set1_epi8(8));
      const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), eights);
#pragma GCC unroll 16
      for (size_t v = 0; v < kVectors; ++v) s[v] = start;
    }
    for (size_t b = 0; b < each; ++b, codes += kVectors * 64, x += kBlock) {
      const __m512i first = sixteen512(x), second = sixteen512(x + 16);
#pragma GCC unroll 16
      for (size_t v = 0; v < kVectors; ++v) {
        const __m512i both = _mm512_loadu_si512(codes + 64 * v);
        add_fours512(s[v], first, half512<TABLES>(both, false, levels + 64 * v));
        add_fours512(s[v], second, half512<TABLES>(both, true, levels + 64 * v));
      }
    }
    if constexpr (!TABLES) {
#pragma GCC unroll 4
      for (size_t q = 0; q < 4; ++q) {
        const __m128i steps = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + 16 * q));
        totals[q] = _mm512_add_epi32(totals[q], _mm512_mullo_epi32(across512(s + 4 * q), _mm512_cvtepi8_epi32(steps)));
      }
    }
  }
  alignas(64) int32_t sums[kWidth];
#pragma GCC unroll 4
  for (size_t q = 0; q < 4; ++q) _mm512_store_si512(sums + 16 * q, TABLES ? across512(s + 4 * q) : totals[q]);
  finish512(p.finish, row, sums, panel * kWidth);
}

AVX512 inline __mmask16 lanes(size_t left) { return static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1); }

AVX512 Moments moments512(const float* x, size_t n, bool centred, float epsilon) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (size_t i = 0; i < n && centred; i += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(n - i), x + i));
  const float mean = _mm512_reduce_add_ps(sum) / static_cast<float>(n);
  for (size_t i = 0; i < n; i += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes(n - i), x + i);
    const __m512 d = _mm512_maskz_sub_ps(lanes(n - i), value, _mm512_set1_ps(mean));
    squares = _mm512_fmadd_ps(d, d, squares);
  }
  return {mean, 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(n) + epsilon)};
}

// 16 numbers of a row from x on, normalized.
AVX512 inline __m512 normalized512(const float* x, __mmask16 in, const Moments& m, const float* gain, const float* shift) {
  const __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(in, x), _mm512_set1_ps(m.mean));
  const __m512 offset = shift ? _mm512_maskz_loadu_ps(in, shift) : _mm512_setzero_ps();
  return _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(m.scale)), _mm512_maskz_loadu_ps(in, gain), offset);
}

AVX512 void normalize512(const Norm& f, size_t row, const float* x) {
  const Moments m = moments512(x, f.n, true, f.epsilon);
  for (size_t i = 0; i < f.n; i += 16) {
    const __mmask16 in = lanes(f.n - i);
    const __m512 y = normalized512(x + i, in, m, f.gain + i, f.shift + i);
    const __m128i codes = codes512(y, _mm512_set1_ps(f.inverse), _mm512_set1_epi32(f.zero));
    _mm_mask_storeu_epi8(f.codes + row * f.n + i, in, codes);
    const __m512 factor = _mm512_maskz_loadu_ps(in, f.multiply + i), offset = _mm512_maskz_loadu_ps(in, f.add + i);
    _mm512_mask_storeu_ps(f.out + row * f.n + i, in, _mm512_fmadd_ps(y, factor, offset));
  }
}

// sum + a b for pairs of bfloat16.
template <bool NATIVE>
AVX512 inline void add_pairs512(__m512& sum, __m512i a, __m512i b) {
  if constexpr (NATIVE) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  } else {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, upper)), _mm512_castsi512_ps(_mm512_and_si512(b, upper)), sum);
  }
}

// ROWS rows of a [ROWS, depth] by b [depth, 16 VECTORS], both of pairs of bfloat16 along depth.
template <bool NATIVE, size_t ROWS, size_t VECTORS>
AVX512 inline void dot512(const uint32_t* a, size_t a_stride, const uint32_t* b, size_t b_stride, size_t depth, float* out,
                          size_t out_stride) {
#define START(i) __m512 s##i##0 = _mm512_setzero_ps(), s##i##1 = s##i##0, s##i##2 = s##i##0, s##i##3 = s##i##0;
  EACH_ROW(START)
  for (size_t k = 0; k < depth; ++k, b += b_stride) {
    const __m512i w0 = _mm512_loadu_si512(b), w1 = VECTORS > 1 ? _mm512_loadu_si512(b + 16) : w0;
    const __m512i w2 = VECTORS > 2 ? _mm512_loadu_si512(b + 32) : w0, w3 = VECTORS > 3 ? _mm512_loadu_si512(b + 48) : w0;
#define STEP(i)                                                                        \
  if constexpr (ROWS > i) {                                                            \
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a[i * a_stride + k]));     \
    add_pairs512<NATIVE>(s##i##0, pair, w0);                                           \
    if constexpr (VECTORS > 1) add_pairs512<NATIVE>(s##i##1, pair, w1);                \
    if constexpr (VECTORS > 2) add_pairs512<NATIVE>(s##i##2, pair, w2);                \
    if constexpr (VECTORS > 3) add_pairs512<NATIVE>(s##i##3, pair, w3);                \
  }
    EACH_ROW(STEP)
  }
#define STORE(i)                                                                     \
  if constexpr (ROWS > i) {                                                          \
    _mm512_storeu_ps(out + i * out_stride, s##i##0);                                 \
    if constexpr (VECTORS > 1) _mm512_storeu_ps(out + i * out_stride + 16, s##i##1); \
    if constexpr (VECTORS > 2) _mm512_storeu_ps(out + i * out_stride + 32, s##i##2); \
    if constexpr (VECTORS > 3) _mm512_storeu_ps(out + i * out_stride + 48, s##i##3); \
  }
  EACH_ROW(STORE)
#undef START
#undef STEP
#undef STORE
}

template <bool NATIVE, size_t VECTORS>
AVX512 inline void dot_rows512(size_t rows, const uint32_t* a, size_t a_stride, const uint32_t* b, size_t b_stride,
                               size_t depth, float* out, size_t out_stride) {
  switch (rows) {
    case 1: return dot512<NATIVE, 1, VECTORS>(a, a_stride, b, b_stride, depth, out, out_stride);
    case 2: return dot512<NATIVE, 2, VECTORS>(a, a_stride, b, b_stride, depth, out, out_stride);
    case 3: return dot512<NATIVE, 3, VECTORS>(a, a_stride, b, b_stride, depth, out, out_stride);
    case 4: return dot512<NATIVE, 4, VECTORS>(a, a_stride, b, b_stride, depth, out, out_stride);
    case 5: return dot512<NATIVE, 5, VECTORS>(a, a_stride, b, b_stride, depth, out, out_stride);
    default: return dot512<NATIVE, 6, VECTORS>(a, a_stride, b, b_stride, depth, out, out_stride);
  }
}

// a [rows, depth] by b [depth, columns], columns a multiple of 16.
template <bool NATIVE>
AVX512 inline void product512(size_t rows, const uint32_t* a, size_t a_stride, const uint32_t* b, size_t b_stride,
                              size_t depth, float* out, size_t out_stride, size_t columns) {
  for (size_t at = 0; at < columns; at += 64) {
    switch (std::min<size_t>(64, columns - at)) {
      case 16: dot_rows512<NATIVE, 1>(rows, a, a_stride, b + at, b_stride, depth, out + at, out_stride); break;
      case 32: dot_rows512<NATIVE, 2>(rows, a, a_stride, b + at, b_stride, depth, out + at, out_stride); break;
      case 48: dot_rows512<NATIVE, 3>(rows, a, a_stride, b + at, b_stride, depth, out + at, out_stride); break;
      default: dot_rows512<NATIVE, 4>(rows, a, a_stride, b + at, b_stride, depth, out + at, out_stride);
    }
  }
}

// Softmax of one row of scores, without its division, as bfloat16; returns the sum of what is written, infinite where every
// key is masked. 2^x by a cubic in
// the fraction, whose relative error of 8e-5 is far below that of bfloat16.
AVX512 inline float shares512(const float* scores, size_t keys, float scale, const float* mask, float* raised,
                              uint16_t* shares) {
  constexpr float kLog2e = 1.44269504f;
  const __m512 factor = _mm512_set1_ps(scale * kLog2e), least = _mm512_set1_ps(-FLT_MAX);
  __m512 largest = least, total = _mm512_setzero_ps();
  for (size_t j = 0; j < keys; j += 16) {
    __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + j), factor);
    if (mask) score = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes(keys - j), mask + j), _mm512_set1_ps(kLog2e), score);
    score = _mm512_mask_max_ps(least, lanes(keys - j), score, least);
    largest = _mm512_max_ps(largest, score);
    _mm512_storeu_ps(raised + j, score);
  }
  largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  if (_mm512_cvtss_f32(largest) == -FLT_MAX) total = _mm512_set1_ps(INFINITY);
  for (size_t j = 0; j < keys; j += 16) {
    const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(raised + j), largest), n = _mm512_roundscale_ps(x, 8);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.05517156f), r, _mm512_set1_ps(0.24261118f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693261f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.9999281f));
    const __m512i upper = _mm512_srli_epi32(rounded512(_mm512_maskz_scalef_ps(lanes(keys - j), p, n)), 16);
    total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(upper, 16)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(shares + j), _mm512_cvtepi32_epi16(upper));
  }
  return _mm512_reduce_add_ps(total);
}

// Up to 16 pairs of bfloat16 of a row; floats are rounded to bfloat16 already.
AVX512 inline __m512i pairs512(const uint16_t* row, size_t left) { return _mm512_maskz_loadu_epi32(lanes(left), row); }
AVX512 inline __m512i pairs512(const float* row, size_t left) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i first = _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes(2 * left), row));
  const __m512i second = left > 8 ? _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes(2 * left - 16), row + 16)) : first;
  return _mm512_permutex2var_epi16(first, _mm512_load_si512(kUpper), second);
}

// 16 numbers of a row as bfloat16, in the lower halves of 32 bits.
AVX512 inline __m512i lower512(const uint16_t* row) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
}
AVX512 inline __m512i lower512(const float* row) { return _mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(row)), 16); }

AVX512 inline void transpose512(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Keys and values of one head as its products read them: keys as columns [D / 2, padded], two numbers of one key side by
// side; values as rows [padded / 2, D], the numbers of two keys side by side. What is beyond `keys` is 0.
struct Packed {
  uint32_t *columns, *values;
  size_t padded;

  static size_t size_of(size_t keys, size_t size) { return (keys + 15) / 16 * 16 * size; }
  Packed(uint32_t* room, size_t keys, size_t size) : columns(room), padded((keys + 15) / 16 * 16) {
    values = columns + size / 2 * padded;
  }
};

// Pack the rows that `chosen` names, or the first `keys` where it is null.
template <typename Number>
AVX512 void pack512(const Packed& to, const Rows<Number>& k, const Rows<Number>& v, const uint32_t* chosen, size_t keys,
                    size_t size) {
  const size_t half = size / 2;
  const auto at = [&](size_t j) { return chosen ? chosen[j] : j; };
  for (size_t j = 0; j < to.padded; j += 16) {
    for (size_t d = 0; d < half; d += 16) {
      __m512i rows[16];
      for (size_t i = 0; i < 16; ++i)
        rows[i] = j + i < keys ? pairs512(k(at(j + i)) + 2 * d, half - d) : _mm512_setzero_si512();
      transpose512(rows);
      for (size_t i = 0; i < std::min<size_t>(16, half - d); ++i)
        _mm512_storeu_si512(to.columns + (d + i) * to.padded + j, rows[i]);
    }
  }
  for (size_t j = 0; j < to.padded; j += 2) {
    for (size_t d = 0; d < size; d += 16) {
      const __m512i even = j < keys ? lower512(v(at(j)) + d) : _mm512_setzero_si512();
      const __m512i odd = j + 1 < keys ? lower512(v(at(j + 1)) + d) : _mm512_setzero_si512();
      _mm512_storeu_si512(to.values + j / 2 * size + d, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

// The first `h.keys` of the packed keys are attended to.
template <bool NATIVE>
AVX512 void attend512(const Head& h, const Packed& packed, std::vector<uint32_t>& scratch) {
  const size_t padded = (h.keys + 15) / 16 * 16, pairs = padded / 2, half = h.size / 2;
  uint32_t* shares = at_least(scratch, kTileRows * (2 * padded + pairs + h.size));
  float* scores = reinterpret_cast<float*>(shares + kTileRows * pairs);
  float *raised = scores + kTileRows * padded, *sums = raised + kTileRows * padded;
  for (size_t i = h.first; i < h.last; i += kTileRows) {
    const size_t rows = std::min(kTileRows, h.last - i);
    uint32_t queries[kTileRows * 128];
    for (size_t r = 0; r < rows; ++r) std::memcpy(queries + r * half, h.q + (i + r) * h.stride, 2 * h.size);
    product512<NATIVE>(rows, queries, half, packed.columns, packed.padded, half, scores, padded, padded);
    float totals[kTileRows];
    for (size_t r = 0; r < rows; ++r)
      totals[r] = shares512(scores + r * padded, h.keys, h.scale, h.mask ? h.mask + (i + r) * h.mask_stride : nullptr,
                            raised, reinterpret_cast<uint16_t*>(shares + r * pairs));
    product512<NATIVE>(rows, shares, pairs, packed.values, h.size, (h.keys + 1) / 2, sums, h.size, h.size);
    for (size_t r = 0; r < rows; ++r) {
      for (size_t d = 0; d < h.size; d += 16) {
        const __m512 y = _mm512_loadu_ps(sums + r * h.size + d);
        const size_t to = (i + r) * h.out_stride + d;
        if (h.out_float) _mm512_storeu_ps(h.out_float + to, _mm512_mul_ps(y, _mm512_set1_ps(1.0f / totals[r])));
        if (h.out)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(h.out + to),
                           codes512(y, _mm512_set1_ps(h.inverse / totals[r]), _mm512_set1_epi32(h.zero)));
      }
    }
  }
}

AVX512 void rotate512(const float* x, const float* cosines, const float* sines, size_t half, float* out) {
  for (size_t d = 0; d < half; d += 16) {
    const __mmask16 in = lanes(half - d);
    const __m512 a = _mm512_maskz_loadu_ps(in, x + d), b = _mm512_maskz_loadu_ps(in, x + half + d);
    const __m512 c = _mm512_maskz_loadu_ps(in, cosines + d), s = _mm512_maskz_loadu_ps(in, sines + d);
    _mm512_mask_storeu_ps(out + d, in, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)));
    _mm512_mask_storeu_ps(out + half + d, in, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
  }
}

AVX512 void round512(const float* x, size_t n, float* out) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 in = lanes(n - i);
    const __m512i bits = _mm512_and_si512(rounded512(_mm512_maskz_loadu_ps(in, x + i)), upper);
    _mm512_mask_storeu_ps(out + i, in, _mm512_castsi512_ps(bits));
  }
}

AVX512 void add_norm512(const Joint& f, size_t row, float* out) {
  const float* a = f.a + row * f.n;
  const float* sum = f.b ? f.sum + row * f.n : a;
  for (size_t i = 0; i < f.n && f.b; i += 16) {
    const __mmask16 in = lanes(f.n - i);
    const __m512 b = _mm512_maskz_loadu_ps(in, f.b + row * f.n + i);
    _mm512_mask_storeu_ps(f.sum + row * f.n + i, in, _mm512_add_ps(_mm512_maskz_loadu_ps(in, a + i), b));
  }
  const Moments m = moments512(sum, f.n, f.shift != nullptr, f.epsilon);
  for (size_t i = 0; i < f.n; i += 16) {
    const __mmask16 in = lanes(f.n - i);
    _mm512_mask_storeu_ps(out + i, in, normalized512(sum + i, in, m, f.gain + i, f.shift ? f.shift + i : nullptr));
  }
}

AVX512 void gate512(const float* x, size_t n, float* out) {
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 in = lanes(n - i);
    const __m512 gate = activate512(_mm512_maskz_loadu_ps(in, x + i), Activation::kSilu);
    _mm512_mask_storeu_ps(out + i, in, _mm512_mul_ps(gate, _mm512_maskz_loadu_ps(in, x + n + i)));
  }
}

AVX512 void encode512(const Codes& c, const float* x, size_t n, uint8_t* codes, float& step, float& low) {
  __m512 inverse = _mm512_set1_ps(c.inverse), least = _mm512_setzero_ps();
  __m512i zero = _mm512_set1_epi32(c.zero);
  low = 0;
  if (c.own_range) {
    __m512 most = least = _mm512_set1_ps(x[0]);
    for (size_t i = 0; i < n; i += 16) {
      const __m512 v = _mm512_mask_loadu_ps(_mm512_set1_ps(x[0]), lanes(n - i), x + i);
      least = _mm512_min_ps(least, v);
      most = _mm512_max_ps(most, v);
    }
    low = _mm512_reduce_min_ps(least);
    const float span = std::max(_mm512_reduce_max_ps(most) - low, kSmallest);
    least = _mm512_set1_ps(low);
    inverse = _mm512_set1_ps(255.0f / span);
    step = span / 255.0f;
    zero = _mm512_setzero_si512();
  }
  for (size_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes(n - i), x + i), least);
    _mm_mask_storeu_epi8(codes + i, lanes(n - i), codes512(v, inverse, zero));
  }
}

template <bool NATIVE>
AVX512 void float_tile512(const FloatProduct& p, size_t row, size_t rows, size_t panel) {
  alignas(64) float sums[kTileRows * kWidth];
  const uint32_t* weight = p.weight + panel * kWidth * p.pairs;
  dot_rows512<NATIVE, 4>(rows, p.x + row * p.pairs, p.pairs, weight, kWidth, p.pairs, sums, kWidth);
  for (size_t i = 0; i < rows; ++i) {
    for (size_t at = panel * kWidth; at < std::min(p.n, (panel + 1) * kWidth); at += 16) {
      const __mmask16 in = lanes(p.n - at);
      const size_t to = (row + i) * p.n + at;
      const __m512 sum = _mm512_load_ps(sums + i * kWidth + at % kWidth);
      __m512 y = activate512(_mm512_add_ps(sum, _mm512_maskz_loadu_ps(in, p.bias + at)), p.activation);
      if (p.residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(in, p.residual + to));
      _mm512_mask_storeu_ps(p.out + to, in, y);
    }
  }
}

AVX512 void to_bfloats512(const float* x, size_t n, uint16_t* out) {
  for (size_t i = 0; i < n; i += 16)
    _mm256_mask_storeu_epi16(out + i, lanes(n - i), bfloats512(_mm512_maskz_loadu_ps(lanes(n - i), x + i)));
}

#endif  // HAS_AVX512

bool has_vnni() {
#if HAS_AVX512
  static const bool has = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return has;
#else
  return false;
#endif
}

bool has_bfloat() {
#if HAS_AVX512
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

void normalize(const Norm& norm, size_t row, const float* x) {
#if HAS_AVX512
  if (has_vnni()) return normalize512(norm, row, x);
#endif
  normalize_plain(norm, row, x);
}

#if HAS_AVX512
void attend_packed(const Head& head, const Packed& packed) {
  thread_local std::vector<uint32_t> scratch;
  has_bfloat() ? attend512<true>(head, packed, scratch) : attend512<false>(head, packed, scratch);
}
#endif

void attend(const Head& head) {
  thread_local std::vector<uint32_t> room;
#if HAS_AVX512
  if (has_vnni()) {
    const Packed packed(at_least(room, Packed::size_of(head.keys, head.size)), head.keys, head.size);
    const Rows<uint16_t> k{nullptr, head.k, 0, head.stride}, v{nullptr, head.v, 0, head.stride};
    pack512(packed, k, v, nullptr, head.keys, head.size);
    return attend_packed(head, packed);
  }
#endif
  attend_plain(head, room);
}

#if HAS_AVX512
#define CHOOSE(fast, plain) (has_vnni() ? (fast) : (plain))
#else
#define CHOOSE(fast, plain) (plain)
#define rotate512 rotate_plain
#define round512 round_plain
#define add_norm512 add_norm_plain
#define gate512 gate_plain
#define encode512 encode_plain
#endif

void tile(const Product& p, size_t row, size_t rows, size_t panel, const int8_t* weight) {
#if HAS_AVX512
  if (has_vnni()) {
    switch (rows) {
      case 1: return tile512<1>(p, row, panel, weight);
      case 2: return tile512<2>(p, row, panel, weight);
      case 3: return tile512<3>(p, row, panel, weight);
      case 4: return tile512<4>(p, row, panel, weight);
      case 5: return tile512<5>(p, row, panel, weight);
      default: return tile512<6>(p, row, panel, weight);
    }
  }
#endif
  tile_plain(p, row, rows, panel, weight);
}

void float_tile(const FloatProduct& p, size_t row, size_t rows, size_t panel) {
#if HAS_AVX512
  if (has_vnni())
    return has_bfloat() ? float_tile512<true>(p, row, rows, panel) : float_tile512<false>(p, row, rows, panel);
#endif
  float_tile_plain(p, row, rows, panel);
}

struct alignas(64) Line {
  int8_t bytes[64];
};

// A panel of a weight as int8; codes are decoded where the cache is this thread's own.
const int8_t* panel_of(const Product& p, size_t panel) {
  if (p.weight != nullptr) return p.weight + panel * kWidth * p.k;
  thread_local std::vector<Line> room;
  int8_t* out = at_least(room, p.k)->bytes;
  CHOOSE(decode512, decode_plain)(p, panel, out);
  return out;
}

// Tiles [top, bottom) of all `tiles` by a panel of codes.
void multiply_codes(const Product& p, size_t panel, size_t top, size_t bottom, size_t tiles) {
#if HAS_AVX512
  if (p.m == 1 && has_vnni())
    return p.coded.tables ? coded_row512<true>(p, 0, panel) : coded_row512<false>(p, 0, panel);
#endif
  const int8_t* weight = panel_of(p, panel);
  for (size_t t = top; t < bottom; ++t) {
    const size_t row = t * p.m / tiles, rows = (t + 1) * p.m / tiles - row;
    tile(p, row, rows, panel, weight);
  }
}

constexpr size_t kStretch = 8;        // tiles of rows of a task
constexpr size_t kLongStretch = 24;   // the least of one that decodes its panel
constexpr size_t kTasks = 8;          // about as many of those as there are
constexpr size_t kFew = 4;            // stretches of tasks where each has one tile

// Call work(row, rows, panel) for all tiles of m rows. A task is a stretch of tiles of rows by a few panels: their weights
// stay in the second cache from tile to tile.
template <typename Work>
void by_tiles(const Run& run, size_t m, size_t panels, const Work& work) {
  const size_t tiles = (m + kTileRows - 1) / kTileRows;
  const size_t group = tiles == 1 ? 1 : std::max<size_t>(1, std::min<size_t>(4, panels / 4));
  const size_t stretches = (tiles + kStretch - 1) / kStretch, groups = (panels + group - 1) / group;
  run.parallel(groups * stretches, tiles == 1 ? kFew : kStretches, [&](size_t task) {
    const size_t first = task / stretches * group, last = std::min(first + group, panels);
    const size_t top = task % stretches * kStretch, bottom = std::min(top + kStretch, tiles);
    for (size_t t = top; t < bottom; ++t) {
      const size_t row = t * m / tiles, rows = (t + 1) * m / tiles - row;
      for (size_t panel = first; panel < last; ++panel) work(row, rows, panel);
    }
  });
}

void multiply(const Run& run, const Product& p) {
  const size_t panels = (p.finish.n + kWidth - 1) / kWidth, tiles = (p.m + kTileRows - 1) / kTileRows;
  if (p.weight == nullptr) {  // long stretches, as each decodes its panel anew
    const size_t stretches = std::max<size_t>(1, std::min(tiles / kLongStretch, kTasks / panels + 1));
    return run.parallel(panels * stretches, tiles == 1 ? kFew : kStretches, [&](size_t task) {
      const size_t part = task % stretches;
      multiply_codes(p, task / stretches, part * tiles / stretches, (part + 1) * tiles / stretches, tiles);
    });
  }
  by_tiles(run, p.m, panels, [&](size_t row, size_t rows, size_t panel) {
    tile(p, row, rows, panel, p.weight + panel * kWidth * p.k);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators.

float scalar(const Tensor& tensor) { return *tensor.as<float>(); }

// Whether a value is there and has one element.
bool is_single(const Tensor& tensor) { return tensor && tensor.size() == 1; }

struct Kernel {
  Table api;
  Activation activation = Activation::kNone;
  int64_t n = 0, heads = 0, groups = 0, gated = 0;
  float epsilon = 0, scale = 0;
};

// A weight [K, N] of int8, or of codes where there are levels; whether it fits.
bool read_weight(const Tensor& weight, const Tensor& levels, size_t k, size_t n, Product& p) {
  const size_t panels = (n + kWidth - 1) / kWidth;
  p.k = k;
  p.weight = nullptr;
  if (!levels) {
    p.weight = weight.as<int8_t>();
    return k % 4 == 0 && weight.size() == panels * kWidth * k;
  }
  const bool tables = levels.shape.size() == 4;
  const size_t each = panels * kWidth * (tables ? kLevels : 1);
  p.coded = {weight.as<uint8_t>(), levels.as<int8_t>(), each ? levels.size() / each : 0, tables};
  return k % kBlock == 0 && weight.size() == panels * kWidth * k / 2 && p.coded.groups > 0 &&
         levels.size() == p.coded.groups * each && k / kBlock % p.coded.groups == 0;
}

// The inputs that the forms of Linear share: x, weight, sums, scales, x_scale, x_zero, bias; and the place of the levels.
ort::Status* read_product(const Run& run, const Kernel& kernel, size_t levels, Product& p, Tensor& x) {
  x = run.input(0);
  const Tensor weight = run.input(1), sums = run.input(2), scales = run.input(3), bias = run.input(6);
  const size_t n = static_cast<size_t>(kernel.n), k = x.last();
  if (!read_weight(weight, run.input(levels), k, n, p) || sums.size() != n || scales.size() != n || bias.size() != n ||
      !is_single(run.input(4)) || !is_single(run.input(5)))
    return run.fault("the weight, scales, sums or bias of a scalefold::Linear do not fit its input and N");
  p.x = x.as<uint8_t>();
  p.m = x.rows();
  p.finish = Finish{};
  p.finish.sums = sums.as<int32_t>();
  p.finish.scales = scales.as<float>();
  p.finish.bias = bias.as<float>();
  p.finish.x_scale = scalar(run.input(4));
  p.finish.x_zero = *run.input(5).as<uint8_t>();
  p.finish.activation = kernel.activation;
  p.finish.n = n;
  return nullptr;
}

std::vector<int64_t> with_last(std::vector<int64_t> shape, int64_t last) {
  shape.back() = last;
  return shape;
}

ort::Status* linear(const Kernel& kernel, const Run& run) {
  Product p{};
  Tensor x;
  if (ort::Status* status = read_product(run, kernel, 8, p, x)) return status;
  const Tensor residual = run.input(7);
  if (residual && residual.size() != p.m * p.finish.n) return run.fault("the residual of a scalefold::Linear does not fit");
  p.finish.residual = residual.as<float>();
  p.finish.out_float = run.output(0, with_last(x.shape, kernel.n)).as<float>();
  multiply(run, p);
  return nullptr;
}

ort::Status* linear_uint8(const Kernel& kernel, const Run& run) {
  Product p{};
  Tensor x;
  if (ort::Status* status = read_product(run, kernel, 9, p, x)) return status;
  if (!is_single(run.input(7)) || !is_single(run.input(8))) return run.fault("a scalefold::LinearUint8 has no single step");
  p.finish.inverse = 1.0f / scalar(run.input(7));
  p.finish.zero = *run.input(8).as<uint8_t>();
  p.finish.out_codes = run.output(0, with_last(x.shape, kernel.n)).as<uint8_t>();
  multiply(run, p);
  return nullptr;
}

ort::Status* linear_bfloat16(const Kernel& kernel, const Run& run) {
  Product p{};
  Tensor x;
  if (ort::Status* status = read_product(run, kernel, 7, p, x)) return status;
  p.finish.out_bfloat = run.output(0, with_last(x.shape, kernel.n)).as<uint16_t>();
  multiply(run, p);
  return nullptr;
}

// Rows are shared among threads where there are many.
template <typename Work>
void by_rows(const Run& run, size_t rows, const Work& work) {
  const size_t block = 16;
  run.parallel((rows + block - 1) / block, kStretches, [&](size_t task) {
    for (size_t i = task * block; i < std::min(rows, (task + 1) * block); ++i) work(i);
  });
}

// The inputs of a normalization from `first` on: gain, shift, multiply, add, y_scale, y_zero.
ort::Status* read_norm(const Run& run, const Kernel& kernel, size_t first, const std::vector<int64_t>& shape, Norm& norm) {
  const Tensor gain = run.input(first), shift = run.input(first + 1), multiply = run.input(first + 2), add = run.input(first + 3);
  if (shape.empty() || !is_single(run.input(first + 4)) || !is_single(run.input(first + 5)))
    return run.fault("a normalization of domain scalefold has no rows or no single step");
  norm.n = static_cast<size_t>(shape.back());
  for (const Tensor* each : {&gain, &shift, &multiply, &add})
    if (each->size() != norm.n) return run.fault("the constants of a normalization of domain scalefold do not fit its input");
  norm.gain = gain.as<float>();
  norm.shift = shift.as<float>();
  norm.multiply = multiply.as<float>();
  norm.add = add.as<float>();
  norm.epsilon = kernel.epsilon;
  norm.inverse = 1.0f / scalar(run.input(first + 4));
  norm.zero = *run.input(first + 5).as<uint8_t>();
  norm.out = run.output(0, shape).as<float>();
  norm.codes = run.output(1, shape).as<uint8_t>();
  return nullptr;
}

ort::Status* linear_norm_uint8(const Kernel& kernel, const Run& run) {
  Product p{};
  Tensor x;
  Norm norm{};
  if (ort::Status* status = read_product(run, kernel, 14, p, x)) return status;
  const Tensor residual = run.input(7);
  const size_t n = p.finish.n;
  if (residual.size() != p.m * n) return run.fault("the residual of a scalefold::LinearNormUint8 does not fit");
  if (ort::Status* status = read_norm(run, kernel, 8, with_last(x.shape, kernel.n), norm)) return status;
  p.finish.residual = residual.as<float>();
  const size_t tiles = (p.m + kTileRows - 1) / kTileRows, panels = (n + kWidth - 1) / kWidth;
  thread_local std::vector<float> scratch;
  const bool coded = p.weight == nullptr;  // then tasks are few, as each decodes all columns
  if (tiles < (coded ? 2 * kLongStretch : 4)) {  // too few rows to share: threads share the columns
    const float* rows = p.finish.out_float = at_least(scratch, p.m * n);
    multiply(run, p);
    by_rows(run, p.m, [&](size_t row) { normalize(norm, row, rows + row * n); });
    return nullptr;
  }
  const size_t most = coded ? kLongStretch : 4;  // rows whose sums the second cache holds
  const size_t parts = kTasks * ((tiles + kTasks * most - 1) / (kTasks * most));
  const size_t stretch = coded ? (tiles + parts - 1) / parts : std::min(most, (tiles + 3) / 4);
  run.parallel((tiles + stretch - 1) / stretch, kStretches, [&](size_t task) {
    const size_t top = task * stretch, bottom = std::min(top + stretch, tiles);
    const size_t first = top * p.m / tiles, last = bottom * p.m / tiles;
    Product mine = p;
    mine.finish.out_float = at_least(scratch, (last - first) * n);
    mine.finish.out_first = first;
    for (size_t panel = 0; panel < panels; ++panel) {
      const int8_t* weight = panel_of(p, panel);
      for (size_t t = top; t < bottom; ++t) {
        const size_t row = t * p.m / tiles;
        tile(mine, row, (t + 1) * p.m / tiles - row, panel, weight);
      }
    }
    for (size_t i = first; i < last; ++i) normalize(norm, i, scratch.data() + (i - first) * n);
  });
  return nullptr;
}

ort::Status* layer_norm_uint8(const Kernel& kernel, const Run& run) {
  const Tensor x = run.input(0);
  Norm norm{};
  if (ort::Status* status = read_norm(run, kernel, 1, x.shape, norm)) return status;
  by_rows(run, x.rows(), [&](size_t row) { normalize(norm, row, x.as<float>() + row * norm.n); });
  return nullptr;
}

// Strides of a mask [B, H, S, T] by batch, head and query, 0 where a dimension is 1.
bool mask_strides(const Tensor& mask, size_t batch, size_t heads, size_t tokens, size_t keys, size_t strides[3]) {
  const size_t full[3] = {batch, heads, tokens};
  if (mask.shape.size() != 4 || mask.last() != keys) return false;
  size_t step = keys;
  for (const int axis : {2, 1, 0}) {
    const size_t dim = static_cast<size_t>(mask.shape[axis]);
    if (dim != 1 && dim != full[axis]) return false;
    strides[axis] = dim == 1 ? 0 : step;
    step *= dim;
  }
  return true;
}

ort::Status* attention_uint8(const Kernel& kernel, const Run& run) {
  const Tensor x = run.input(0), mask = run.input(3);
  const size_t heads = static_cast<size_t>(kernel.heads), size = x.last() / 3 / heads;
  if (x.shape.size() != 3 || x.last() != 3 * heads * size || size % 16 || size > 256 || !is_single(run.input(1)) ||
      !is_single(run.input(2)))
    return run.fault("scalefold::AttentionUint8 takes [batch, tokens, 3 * heads * size], size a multiple of 16 up to 256");
  const size_t batch = static_cast<size_t>(x.shape[0]), tokens = static_cast<size_t>(x.shape[1]);
  size_t strides[3] = {0, 0, 0};  // of the mask, by batch, head and query
  if (mask && !mask_strides(mask, batch, heads, tokens, tokens, strides))
    return run.fault("the mask of a scalefold::AttentionUint8 does not fit: [batch, heads, tokens, tokens], or 1s");
  Head head{};
  head.stride = 3 * heads * size;
  head.mask_stride = strides[2];
  head.keys = tokens;
  head.size = size;
  head.scale = 1.0f / std::sqrt(static_cast<float>(size));
  head.out_stride = heads * size;
  head.inverse = 1.0f / scalar(run.input(1));
  head.zero = *run.input(2).as<uint8_t>();
  uint8_t* out = run.output(0, with_last(x.shape, static_cast<int64_t>(heads * size))).as<uint8_t>();
  const size_t block = 192, blocks = (tokens + block - 1) / block;
  run.parallel(batch * heads * blocks, kStretches, [&](size_t task) {
    const size_t b = task / blocks / heads, h = task / blocks % heads;
    Head each = head;
    each.q = x.as<uint16_t>() + b * tokens * each.stride + h * size;
    each.k = each.q + heads * size;
    each.v = each.k + heads * size;
    each.mask = mask ? mask.as<float>() + b * strides[0] + h * strides[1] : nullptr;
    each.out = out + b * tokens * each.out_stride + h * size;
    each.first = task % blocks * block;
    each.last = std::min(tokens, each.first + block);
    attend(each);
  });
  return nullptr;
}

void rotate(const Cached& c, const float* row, size_t angle, float* out) {
  if (c.cosines == nullptr) return static_cast<void>(std::memcpy(out, row, c.size * sizeof(float)));
  CHOOSE(rotate512, rotate_plain)(row, c.cosines + angle, c.sines + angle, c.size / 2, out);
}

// Keys and values of one head of them: those of the cache, and the new ones behind, all rounded to bfloat16. Those of an
// earlier step are so already; a prefix that was baked in is not.
void extend(const Cached& c, size_t b, size_t g) {
  const size_t half = c.size / 2, head = b * c.groups + g, old = c.past * c.size;
  float *k = c.k + head * c.grown() * c.size, *v = c.v + head * c.grown() * c.size;
  CHOOSE(round512, round_plain)(c.past_k + head * old, old, k);
  CHOOSE(round512, round_plain)(c.past_v + head * old, old, v);
  for (size_t s = 0; s < c.tokens; ++s) {
    const float* row = c.qkv + (b * c.tokens + s) * c.width() + (c.heads + g) * c.size;
    const size_t angle = (b * c.tokens + s) * half, to = old + s * c.size;
    rotate(c, row, angle, k + to);
    CHOOSE(round512, round_plain)(k + to, c.size, k + to);
    CHOOSE(round512, round_plain)(row + c.groups * c.size, c.size, v + to);
  }
}

// The query of a token for one head, rotated.
void query(const Cached& c, size_t b, size_t s, size_t head, float* out) {
  const size_t angle = (b * c.tokens + s) * c.size / 2;
  const float* row = c.qkv + (b * c.tokens + s) * c.width() + head * c.size;
  rotate(c, row, angle, out);
}

#if HAS_AVX512
// The keys of one sequence that any of its queries sees, and the mask of those. Padding is left out, wherever it lies, so
// that numbers are added in the same order with it and without.
struct Seen {
  std::vector<uint32_t> keys;  // empty where all are
  std::vector<float> own;
  const float* mask;
  size_t stride, count;

  void find(const Cached& c, size_t b) {
    mask = c.mask_row(b, 0, 0);
    stride = c.mask_strides[2];
    count = c.total();
    keys.clear();
    if (c.mask_strides[1]) return;  // heads differ
    std::vector<uint8_t> seen(count, 0);
    size_t left = count;
    for (size_t s = c.tokens; s-- > 0 && left > 0;)
      for (size_t j = 0; j < count; ++j)
        if (!seen[j] && mask[s * stride + j] >= kMasked) seen[j] = 1, --left;
    if (left == 0 || left == count) return;
    for (size_t j = 0; j < count; ++j)
      if (seen[j]) keys.push_back(static_cast<uint32_t>(j));
    at_least(own, c.tokens * keys.size());
    for (size_t s = 0; s < c.tokens; ++s)
      for (size_t j = 0; j < keys.size(); ++j) own[s * keys.size() + j] = mask[s * stride + keys[j]];
    mask = own.data();
    stride = count = keys.size();
  }

  const uint32_t* chosen() const { return keys.empty() ? nullptr : keys.data(); }
};

// Queries [first, first + rows) of one head, by the packed keys and values that are seen.
void attend_queries(const Cached& c, size_t b, size_t head, size_t first, size_t rows, const Packed& packed, const Seen& seen) {
  thread_local std::vector<uint16_t> queries;
  thread_local std::vector<float> rotated;
  at_least(queries, rows * c.size);
  at_least(rotated, c.size);
  for (size_t s = 0; s < rows; ++s) {
    query(c, b, first + s, head, rotated.data());
    to_bfloats512(rotated.data(), c.size, queries.data() + s * c.size);
  }
  Head each{};
  each.mask = seen.mask + first * seen.stride + (seen.chosen() ? 0 : head * c.mask_strides[1]);
  each.mask_stride = seen.stride;
  for (size_t s = 0; s < rows; ++s) {  // what is behind the last key that any of them sees is left out
    size_t end = seen.count;
    while (end > each.keys && each.mask[s * seen.stride + end - 1] < kMasked) --end;
    each.keys = end;
  }
  if (each.keys == 0) each.keys = seen.count;  // queries that see nothing see all alike
  each.q = queries.data();
  each.stride = c.size;
  each.size = c.size;
  each.last = rows;
  each.scale = c.scale;
  each.out_float = c.out + ((b * c.tokens + first) * c.heads + head) * c.size;
  each.out_stride = c.heads * c.size;
  attend_packed(each, packed);
}

void attend_cached512(const Run& run, const Cached& c) {
  const size_t total = c.total(), each = Packed::size_of(total, c.size), shared = c.heads / c.groups;
  const bool few = c.tokens < 8;  // then one thread does all of a head of keys, and need not wait for the others
  thread_local std::vector<uint32_t> room;
  thread_local std::vector<Seen> sequences;
  uint32_t* packed_heads = at_least(room, c.batch * c.groups * each);
  Seen* seen = at_least(sequences, c.batch);
  for (size_t b = 0; b < c.batch; ++b) seen[b].find(c, b);
  run.parallel(c.batch * c.groups, kStretches, [&](size_t task) {
    const size_t b = task / c.groups, g = task % c.groups;
    extend(c, b, g);
    const Packed packed(packed_heads + task * each, seen[b].count, c.size);
    pack512(packed, c.keys(b, g), c.values(b, g), seen[b].chosen(), seen[b].count, c.size);
    for (size_t head = g * shared; few && head < (g + 1) * shared; ++head)
      attend_queries(c, b, head, 0, c.tokens, packed, seen[b]);
  });
  if (few) return;
  const size_t block = 96, blocks = (c.tokens + block - 1) / block;
  run.parallel(c.batch * c.heads * blocks, kStretches, [&](size_t task) {
    const size_t b = task / blocks / c.heads, head = task / blocks % c.heads, first = task % blocks * block;
    const Packed packed(packed_heads + (b * c.groups + head / shared) * each, seen[b].count, c.size);
    attend_queries(c, b, head, first, std::min(block, c.tokens - first), packed, seen[b]);
  });
}
#endif

void attend_cached_plain(const Run& run, const Cached& c) {
  run.parallel(c.batch * c.groups, kStretches, [&](size_t task) {
    const size_t b = task / c.groups, g = task % c.groups, shared = c.heads / c.groups;
    thread_local std::vector<float> scratch;
    at_least(scratch, c.total() + c.size);
    extend(c, b, g);
    const Rows<float> k = c.keys(b, g), v = c.values(b, g);
    for (size_t s = 0; s < c.tokens; ++s) {
      for (size_t head = g * shared; head < (g + 1) * shared; ++head) {
        query(c, b, s, head, scratch.data());
        round_plain(scratch.data(), c.size, scratch.data());
        attend_row_plain(scratch.data(), k, v, c.total(), c.size, c.scale, c.mask_row(b, head, s), scratch.data() + c.size,
                         c.out + ((b * c.tokens + s) * c.heads + head) * c.size);
      }
    }
  });
}

ort::Status* cached_attention(const Kernel& kernel, const Run& run) {
  const Tensor qkv = run.input(0), past_k = run.input(1), past_v = run.input(2), mask = run.input(3);
  const Tensor cosines = run.input(4), sines = run.input(5), front_k = run.input(6), front_v = run.input(7);
  Cached c{};
  c.heads = static_cast<size_t>(kernel.heads);
  c.groups = static_cast<size_t>(kernel.groups);
  c.size = qkv.last() / (c.heads + 2 * c.groups);
  if (qkv.shape.size() != 3 || qkv.last() != c.width() || c.heads % c.groups || c.size % 16 || c.size > 256 ||
      past_k.shape.size() != 4 || past_k.shape != past_v.shape)
    return run.fault("scalefold::CachedAttention takes [batch, tokens, (heads + 2 * groups) * size] and a cache that fits");
  c.batch = static_cast<size_t>(qkv.shape[0]);
  c.tokens = static_cast<size_t>(qkv.shape[1]);
  c.past = static_cast<size_t>(past_k.shape[2]);
  if (front_k || front_v) {
    if (front_k.shape.size() != 4 || front_k.shape != front_v.shape || front_k.shape[0] != 1 ||
        front_k.shape[1] != kernel.groups || front_k.last() != c.size)
      return run.fault("what is in front of a scalefold::CachedAttention is no [1, groups, tokens, size]");
    c.front = static_cast<size_t>(front_k.shape[2]);
    c.front_k = front_k.as<float>();
    c.front_v = front_v.as<float>();
  }
  const std::vector<int64_t> grown = {qkv.shape[0], kernel.groups, static_cast<int64_t>(c.grown()),
                                      static_cast<int64_t>(c.size)};
  if (past_k.shape[0] != grown[0] || past_k.shape[1] != grown[1] || past_k.shape[3] != grown[3] ||
      !mask_strides(mask, c.batch, c.heads, c.tokens, c.total(), c.mask_strides))
    return run.fault("the cache or the mask of a scalefold::CachedAttention does not fit its tokens");
  const size_t angles = c.batch * c.tokens * c.size / 2;
  if (cosines && (cosines.size() != angles || sines.size() != angles))
    return run.fault("the angles of a scalefold::CachedAttention do not fit its tokens");
  c.qkv = qkv.as<float>();
  c.past_k = past_k.as<float>();
  c.past_v = past_v.as<float>();
  c.cosines = cosines.as<float>();
  c.sines = sines.as<float>();
  c.mask = mask.as<float>();
  c.scale = kernel.scale > 0 ? kernel.scale : 1.0f / std::sqrt(static_cast<float>(c.size));
  c.out = run.output(0, with_last(qkv.shape, static_cast<int64_t>(c.heads * c.size))).as<float>();
  c.k = run.output(1, grown).as<float>();
  c.v = run.output(2, grown).as<float>();
#if HAS_AVX512
  if (has_vnni()) {
    attend_cached512(run, c);
    return nullptr;
  }
#endif
  attend_cached_plain(run, c);
  return nullptr;
}

ort::Status* add_norm(const Kernel& kernel, const Run& run) {
  const Tensor a = run.input(0), b = run.input(1), gain = run.input(2), shift = run.input(3);
  if (a.shape != b.shape || gain.size() != a.last() || (shift && shift.size() != a.last()))
    return run.fault("the values of a scalefold::AddNorm do not fit each other");
  Joint f{};
  f.a = a.as<float>();
  f.b = b.as<float>();
  f.gain = gain.as<float>();
  f.shift = shift.as<float>();
  f.epsilon = kernel.epsilon;
  f.n = a.last();
  f.sum = run.output(0, a.shape).as<float>();
  float* out = run.output(1, a.shape).as<float>();
  by_rows(run, a.rows(), [&](size_t row) { CHOOSE(add_norm512, add_norm_plain)(f, row, out + row * f.n); });
  return nullptr;
}

ort::Status* gated_silu(const Kernel&, const Run& run) {
  const Tensor x = run.input(0);
  const size_t n = x.last() / 2;
  if (x.last() != 2 * n) return run.fault("scalefold::GatedSilu takes two halves side by side");
  float* out = run.output(0, with_last(x.shape, static_cast<int64_t>(n))).as<float>();
  by_rows(run, x.rows(), [&](size_t row) { CHOOSE(gate512, gate_plain)(x.as<float>() + 2 * row * n, n, out + row * n); });
  return nullptr;
}

// What comes before a product of float rows: a normalization where there is a gain, and a gate.
struct FirstStep {
  Joint norm;
  bool gated;
  size_t k;  // of a row behind it

  FirstStep(const Kernel& kernel, const Tensor& x, const Tensor& gain, const Tensor& shift)
      : norm{x.as<float>(), nullptr, gain.as<float>(), shift.as<float>(), kernel.epsilon, x.last(), nullptr},
        gated(kernel.gated != 0), k(gated ? x.last() / 2 : x.last()) {}

  bool fits(const Tensor& x, const Tensor& gain, const Tensor& shift) const {
    return !x.shape.empty() && !(gated && norm.n % 2) && (!gain || gain.size() == norm.n) && (!shift || shift.size() == norm.n);
  }

  // A row, which is good until this thread asks for its next one.
  const float* row(size_t index) const {
    thread_local std::vector<float> scratch;
    const float* from = norm.a + index * norm.n;
    if (norm.gain == nullptr && !gated) return from;
    at_least(scratch, norm.n);
    if (norm.gain) CHOOSE(add_norm512, add_norm_plain)(norm, index, scratch.data());
    if (gated) CHOOSE(gate512, gate_plain)(norm.gain ? scratch.data() : from, k, scratch.data());
    return scratch.data();
  }
};

// Inputs: x, weight, sums, scales, bias, x_scale, x_zero, gain, shift, residual, levels; all from x_scale on may be missing.
ort::Status* row_linear(const Kernel& kernel, const Run& run) {
  const Tensor x = run.input(0), weight = run.input(1), sums = run.input(2), scales = run.input(3), bias = run.input(4);
  const Tensor x_scale = run.input(5), x_zero = run.input(6), gain = run.input(7), shift = run.input(8), residual = run.input(9);
  Product p{};
  const FirstStep first(kernel, x, gain, shift);
  const size_t n = static_cast<size_t>(kernel.n);
  p.m = x.rows();
  if (!read_weight(weight, run.input(10), first.k, n, p) || !first.fits(x, gain, shift) ||
      (x_scale || x_zero) != (is_single(x_scale) && is_single(x_zero)) || sums.size() != n || scales.size() != n ||
      bias.size() != n || (residual && residual.size() != p.m * n))
    return run.fault("the inputs of a scalefold::RowLinear do not fit each other and N");
  thread_local std::vector<uint8_t> codes;
  thread_local std::vector<float> ranges;
  uint8_t* all_codes = at_least(codes, p.m * p.k);
  float *steps = at_least(ranges, 2 * p.m), *lows = steps + p.m;
  Codes how{!x_scale, 0, 0};
  if (x_scale) {
    how.inverse = 1.0f / scalar(x_scale);
    how.zero = *x_zero.as<uint8_t>();
    p.finish.x_scale = scalar(x_scale);
    p.finish.x_zero = how.zero;
  } else {
    p.finish.row_steps = steps;
    p.finish.row_lows = lows;
  }
  by_rows(run, p.m, [&](size_t row) {
    CHOOSE(encode512, encode_plain)(how, first.row(row), p.k, all_codes + row * p.k, steps[row], lows[row]);
  });
  p.x = all_codes;
  p.finish.sums = sums.as<int32_t>();
  p.finish.scales = scales.as<float>();
  p.finish.bias = bias.as<float>();
  p.finish.residual = residual.as<float>();
  p.finish.activation = kernel.activation;
  p.finish.n = n;
  p.finish.out_float = run.output(0, with_last(x.shape, kernel.n)).as<float>();
  multiply(run, p);
  return nullptr;
}

// Inputs: x, weight, bias, gain, shift, residual; all from gain on may be missing.
ort::Status* float_linear(const Kernel& kernel, const Run& run) {
  const Tensor x = run.input(0), weight = run.input(1), bias = run.input(2), gain = run.input(3), shift = run.input(4);
  const Tensor residual = run.input(5);
  const FirstStep first(kernel, x, gain, shift);
  FloatProduct p{};
  p.n = static_cast<size_t>(kernel.n);
  p.m = x.rows();
  p.pairs = first.k / 2;
  const size_t panels = (p.n + kWidth - 1) / kWidth;
  if (!first.fits(x, gain, shift) || first.k % 2 || weight.size() != panels * kWidth * first.k || bias.size() != p.n ||
      (residual && residual.size() != p.m * p.n))
    return run.fault("the inputs of a scalefold::FloatLinear do not fit each other and N");
  thread_local std::vector<uint32_t> rows;
  uint16_t* narrow = reinterpret_cast<uint16_t*>(at_least(rows, p.m * p.pairs));
  by_rows(run, p.m, [&](size_t row) {
    CHOOSE(to_bfloats512, to_bfloats_plain)(first.row(row), first.k, narrow + row * first.k);
  });
  p.x = rows.data();
  p.weight = weight.as<uint32_t>();
  p.bias = bias.as<float>();
  p.residual = residual.as<float>();
  p.activation = kernel.activation;
  p.out = run.output(0, with_last(x.shape, kernel.n)).as<float>();
  by_tiles(run, p.m, panels, [&](size_t row, size_t count, size_t panel) { float_tile(p, row, count, panel); });
  return nullptr;
}

ort::Status* look_up(const Kernel&, const Run& run) {
  const Tensor panels = run.input(0), scales = run.input(1), ids = run.input(2), levels = run.input(3);
  const int64_t count = static_cast<int64_t>(scales.size());
  const size_t k = panels.shape.size() == 4 ? static_cast<size_t>(panels.shape[1]) * (levels ? kBlock : 4) : 0;
  Product table{};
  if (k == 0 || count == 0 || !read_weight(panels, levels, k, scales.size(), table))
    return run.fault("the table of a scalefold::LookUp does not fit its scales");
  std::vector<int64_t> shape = ids.shape;
  shape.push_back(static_cast<int64_t>(k));
  const size_t rows = ids.size();
  for (size_t i = 0; i < rows; ++i)
    if (ids.as<int64_t>()[i] < -count || ids.as<int64_t>()[i] >= count)
      return run.fault("an id is none of the " + std::to_string(count) + " rows of the table of a scalefold::LookUp");
  float* out = run.output(0, shape).as<float>();
  by_rows(run, rows, [&](size_t i) {
    const int64_t id = ids.as<int64_t>()[i];
    const size_t row = static_cast<size_t>(id < 0 ? id + count : id);
    const float scale = scales.as<float>()[row];
    if (levels) return CHOOSE(look_up_coded512, look_up_coded_plain)(table.coded, k, row, scale, out + i * k);
    look_up_plain(table.weight, k, row, scale, out + i * k);
  });
  return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// Registration.

using Compute = ort::Status* (*)(const Kernel&, const Run&);

struct Operator {
  ort::CustomOp table;  // first, so that onnxruntime's pointer to it is one to this
  const char* name;
  std::vector<int> inputs, outputs;
  size_t required;
  Compute compute;
};

struct Instance {
  Kernel kernel;
  Compute compute;
};

const Operator& of(const ort::CustomOp* op) { return *reinterpret_cast<const Operator*>(op); }

int64_t integer_attribute(Table api, const ort::Info* info, const char* name) {
  int64_t value = 0;
  if (void* status = ort::call<void*>(api, 86, info, name, &value)) ort::call<void>(api, 93, status);
  return value;
}

float float_attribute(Table api, const ort::Info* info, const char* name) {
  float value = 0;
  if (void* status = ort::call<void*>(api, 85, info, name, &value)) ort::call<void>(api, 93, status);
  return value;
}

ort::Status* create(const ort::CustomOp* op, Table api, const ort::Info* info, void** made) {
  auto* instance = new Instance{{api}, of(op).compute};
  Kernel& kernel = instance->kernel;
  kernel.n = integer_attribute(api, info, "N");
  kernel.heads = std::max<int64_t>(1, integer_attribute(api, info, "heads"));
  kernel.activation = static_cast<Activation>(integer_attribute(api, info, "activation"));
  kernel.gated = integer_attribute(api, info, "gated");
  kernel.groups = std::max<int64_t>(1, integer_attribute(api, info, "groups"));
  kernel.epsilon = float_attribute(api, info, "epsilon");
  kernel.scale = float_attribute(api, info, "scale");
  *made = instance;
  return nullptr;
}

ort::Status* compute(void* given, ort::Context* context) {
  const auto* instance = static_cast<const Instance*>(given);
  return instance->compute(instance->kernel, Run(instance->kernel.api, context));
}

Operator make(const char* name, std::vector<int> inputs, std::vector<int> outputs, size_t required, Compute body) {
  Operator made{{}, name, std::move(inputs), std::move(outputs), required, body};
  ort::CustomOp& t = made.table;
  t.version = ort::kVersion;
  t.name = [](const ort::CustomOp* op) { return of(op).name; };
  t.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  t.input_type = [](const ort::CustomOp* op, size_t index) { return of(op).inputs[index]; };
  t.inputs = [](const ort::CustomOp* op) { return of(op).inputs.size(); };
  t.output_type = [](const ort::CustomOp* op, size_t index) { return of(op).outputs[index]; };
  t.outputs = [](const ort::CustomOp* op) { return of(op).outputs.size(); };
  t.destroy = [](void* given) { delete static_cast<Instance*>(given); };
  t.input_kind = [](const ort::CustomOp* op, size_t index) { return index < of(op).required ? 0 : 1; };
  t.output_kind = [](const ort::CustomOp*, size_t) { return 0; };
  t.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  t.variadic_inputs = t.variadic_input_kind = t.variadic_outputs = t.variadic_output_kind =
      [](const ort::CustomOp*) { return 1; };
  t.create = create;
  t.compute = compute;
  t.first_version = [](const ort::CustomOp*) { return 1; };
  t.last_version = [](const ort::CustomOp*) { return INT_MAX; };
  return made;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::Options* options,
                                                                                  const ort::Base* base) {
  using namespace ort;
  Table api = base->get_api(kVersion);
  static const Operator operators[] = {
      make("Linear", {kUint8, kInt8, kInt32, kFloat, kFloat, kUint8, kFloat, kFloat, kInt8}, {kFloat}, 7, linear),
      make("LinearUint8", {kUint8, kInt8, kInt32, kFloat, kFloat, kUint8, kFloat, kFloat, kUint8, kInt8}, {kUint8}, 9, linear_uint8),
      make("LinearBfloat16", {kUint8, kInt8, kInt32, kFloat, kFloat, kUint8, kFloat, kInt8}, {kBfloat16}, 7, linear_bfloat16),
      make("LinearNormUint8",
           {kUint8, kInt8, kInt32, kFloat, kFloat, kUint8, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kUint8,
            kInt8},
           {kFloat, kUint8}, 14, linear_norm_uint8),
      make("LayerNormUint8", {kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kUint8}, {kFloat, kUint8}, 7, layer_norm_uint8),
      make("AttentionUint8", {kBfloat16, kFloat, kUint8, kFloat}, {kUint8}, 3, attention_uint8),
      make("RowLinear", {kFloat, kInt8, kInt32, kFloat, kFloat, kFloat, kUint8, kFloat, kFloat, kFloat, kInt8}, {kFloat}, 5, row_linear),
      make("FloatLinear", {kFloat, kBfloat16, kFloat, kFloat, kFloat, kFloat}, {kFloat}, 3, float_linear),
      make("LookUp", {kInt8, kFloat, kInt64, kInt8}, {kFloat}, 3, look_up),
      make("CachedAttention", {kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat}, {kFloat, kFloat, kFloat}, 4,
           cached_attention),
      make("AddNorm", {kFloat, kFloat, kFloat, kFloat}, {kFloat, kFloat}, 3, add_norm),
      make("GatedSilu", {kFloat}, {kFloat}, 1, gated_silu),
  };
  static std::mutex opening;  // sessions may be opened by several threads at once
  static Domain* domain = nullptr;
  const std::lock_guard<std::mutex> alone(opening);
  if (domain == nullptr) {
    Domain* made = nullptr;
    if (Status* status = call<Status*>(api, 26, "scalefold", &made)) return status;
    for (const Operator& each : operators)
      if (Status* status = call<Status*>(api, 27, made, &each.table)) return status;
    domain = made;
  }
  return call<Status*>(api, 28, options, domain);
}

// Whether the fast path runs on this CPU.
extern "C" __attribute__((visibility("default"))) int scalefold_vectorized() { return has_vnni() ? 1 : 0; }
