// Linear layers and attention for a few rows of input on a CPU, as fast as memory gives weights and cache.
//
// y[m, n] = sum_k x[m, k] w[n, k] (+ b[n]), with w in bf16, or in int8 with one scale per output channel. A weight is
// read once for one or two rows of x, widened to fp32 in registers and accumulated in fp32. Both formats are read as
// pairs of vectors of eight: bf16 as the even and the odd elements of sixteen (a shift and a mask widen them), int8 as
// the first and the second eight. x is split alike beforehand. The code is plain GCC/Clang vector extensions: on wider
// machines a vector of eight is what it is, on narrower ones the compiler splits it.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t VECTOR = 8;
constexpr int64_t PAIR = 2 * VECTOR;
constexpr int64_t BLOCK = 8;             // output channels that are computed together
constexpr int64_t LEAST_WORK = 65536;    // multiplications below which another thread does not pay
constexpr int64_t MOST_WORK = 4194304;   // and beyond which a part is no better for being longer

typedef float Floats __attribute__((vector_size(32), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4)));
typedef int8_t Bytes __attribute__((vector_size(8), aligned(1)));

struct BFloat16Weights {
  typedef uint16_t Element;
  static constexpr bool INTERLEAVED = true;
  static inline void load(const Element* from, Floats& first, Floats& second) {
    Words words;
    std::memcpy(&words, from, sizeof(words));
    const Words low = words << 16, high = words & 0xffff0000u;
    std::memcpy(&first, &low, sizeof(first));
    std::memcpy(&second, &high, sizeof(second));
  }
};

struct Int8Weights {
  typedef int8_t Element;
  static constexpr bool INTERLEAVED = false;
  static inline void load(const Element* from, Floats& first, Floats& second) {
    first = widen(from);
    second = widen(from + VECTOR);
  }
  static inline Floats widen(const Element* from) {
#if defined(__AVX2__) // GCC takes the generic conversion apart into single elements
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Floats);
#endif
  }
};

// Calls body(begin, end) for parts of [0, items) on all threads. A thread takes the next part when it is done with
// one: on a shared machine threads are not equally fast, and an equal split waits for the slowest.
template <class Body>
void share(int64_t items, int64_t part, const Body& body) {
  const int64_t parts = (items + part - 1) / part;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), parts);
  if (threads <= 1) {
    if (items > 0) body(0, items);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(part, std::memory_order_relaxed)) < items;)
      body(begin, std::min(begin + part, items));
  });
}

inline float total(const Floats& vector) {
  float sum = 0;
  for (int i = 0; i < VECTOR; i++) sum += vector[i];
  return sum;
}

// ROWS output channels times COLUMNS rows of x; `first` and `second` are x split, each [COLUMNS, half].
template <class Weights, int ROWS, int COLUMNS>
inline void tile(const typename Weights::Element* weights, int64_t inputs, const float* first, const float* second,
                 float* out, int64_t outputs) {
  const int64_t half = inputs / 2;
  Floats sums[ROWS][COLUMNS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int c = 0; c < COLUMNS; c++) sums[r][c] = Floats{};
  for (int64_t i = 0; i < half; i += VECTOR) {
    Floats a[ROWS], b[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      // The same place in the next block: rows are too short for the processor to see a stream in each.
      __builtin_prefetch(weights + (r + BLOCK) * inputs + 2 * i, 0, 2);
      Weights::load(weights + r * inputs + 2 * i, a[r], b[r]);
    }
#pragma GCC unroll 16
    for (int c = 0; c < COLUMNS; c++) {
      const Floats x = *reinterpret_cast<const Floats*>(first + c * half + i);
      const Floats y = *reinterpret_cast<const Floats*>(second + c * half + i);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        sums[r][c] += a[r] * x;
        sums[r][c] += b[r] * y;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int c = 0; c < COLUMNS; c++) out[c * outputs + r] = total(sums[r][c]);
}

// One output channel times one row of x. Channels follow one another in memory, and one stream that is read from end to
// end is what a processor fetches ahead by itself best: no prefetching, only sums enough that none waits for another.
template <class Weights>
inline float line(const typename Weights::Element* weights, int64_t inputs, const float* first, const float* second) {
  constexpr int SUMS = 4;
  const int64_t half = inputs / 2;
  Floats sums[SUMS] = {};
  const auto add = [&](int64_t i, int s) __attribute__((always_inline)) {
    Floats a, b;
    Weights::load(weights + 2 * i, a, b);
    sums[s] += a * *reinterpret_cast<const Floats*>(first + i);
    sums[s] += b * *reinterpret_cast<const Floats*>(second + i);
  };
  int64_t i = 0;
  for (; i + SUMS * VECTOR <= half; i += SUMS * VECTOR)
#pragma GCC unroll 4
    for (int s = 0; s < SUMS; s++) add(i + s * VECTOR, s);
  for (; i < half; i += VECTOR) add(i, 0);
  return total(sums[0] + sums[1] + sums[2] + sums[3]);
}

// The same with x as it came, in bf16: exact, and half the size. In fp32 a long row of x does not stay in the nearest
// cache (32 KiB) beside the weights that stream through it, and is fetched again for every channel.
inline float line(const uint16_t* weights, int64_t inputs, const uint16_t* x) {
  constexpr int SUMS = 4;
  Floats sums[SUMS] = {};
  const auto add = [&](int64_t i, int s) __attribute__((always_inline)) {
    Floats a, b, c, d;
    BFloat16Weights::load(weights + i, a, b);
    BFloat16Weights::load(x + i, c, d);
    sums[s] += a * c;
    sums[s] += b * d;
  };
  int64_t i = 0;
  for (; i + SUMS * PAIR <= inputs; i += SUMS * PAIR)
#pragma GCC unroll 4
    for (int s = 0; s < SUMS; s++) add(i + s * PAIR, s);
  for (; i < inputs; i += PAIR) add(i, 0);
  return total(sums[0] + sums[1] + sums[2] + sums[3]);
}

// Output channels n to n + BLOCK for all rows of x: the weights stay in a near cache between them.
template <class Weights>
void block(const typename Weights::Element* weights, int64_t inputs, int64_t rows, const float* first,
           const float* second, float* out, int64_t outputs) {
  const int64_t half = inputs / 2;
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2)
    for (int64_t r = 0; r < BLOCK; r += 4)
      tile<Weights, 4, 2>(weights + r * inputs, inputs, first + m * half, second + m * half, out + m * outputs + r,
                          outputs);
  for (; m < rows; m++)
    for (int64_t r = 0; r < BLOCK; r++)
      out[m * outputs + r] = line<Weights>(weights + r * inputs, inputs, first + m * half, second + m * half);
}

// Blocks of output channels that a thread takes at once.
int64_t part_of(int64_t inputs, int64_t outputs) {
  const int64_t work = std::clamp(outputs * inputs / 4, LEAST_WORK, MOST_WORK);
  return std::max<int64_t>(1, work / (BLOCK * inputs));
}

void run(const uint16_t* weights, int64_t inputs, int64_t outputs, const uint16_t* x, float* out) {
  share((outputs + BLOCK - 1) / BLOCK, part_of(inputs, outputs), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * BLOCK; n < std::min(end * BLOCK, outputs); n++)
      out[n] = line(weights + n * inputs, inputs, x);
  });
}

template <class Weights>
void run(const typename Weights::Element* weights, int64_t inputs, int64_t outputs, int64_t rows, const float* first,
         const float* second, float* out) {
  const int64_t half = inputs / 2, blocks = outputs / BLOCK;
  share(blocks, part_of(inputs, outputs), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * BLOCK; n < end * BLOCK; n += BLOCK)
      block<Weights>(weights + n * inputs, inputs, rows, first, second, out + n, outputs);
  });
  for (int64_t n = blocks * BLOCK; n < outputs; n++)
    for (int64_t m = 0; m < rows; m++)
      out[m * outputs + n] = line<Weights>(weights + n * inputs, inputs, first + m * half, second + m * half);
}

// x [rows, inputs] -> two of [rows, inputs / 2], as the weights' format pairs them.
template <class Weights, class Input>
void split(const Input* x, int64_t rows, int64_t inputs, float* first, float* second) {
  const int64_t half = inputs / 2;
  for (int64_t m = 0; m < rows; m++)
    for (int64_t i = 0; i < half; i++) {
      const int64_t pair = i / VECTOR * PAIR, lane = i % VECTOR;
      const Input* from = x + m * inputs;
      first[m * half + i] = static_cast<float>(Weights::INTERLEAVED ? from[2 * i] : from[pair + lane]);
      second[m * half + i] = static_cast<float>(Weights::INTERLEAVED ? from[2 * i + 1] : from[pair + VECTOR + lane]);
    }
}

// y = x w^T, times a scale and plus a bias per output channel where given; y in x's type. No intermediate tensors: at
// one row, PyTorch's own conversions would cost as much as a small product.
template <class Weights, class Input>
at::Tensor few_rows(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                    const std::optional<at::Tensor>& bias) {
  const at::Tensor x = input.contiguous();
  const int64_t inputs = weight.size(1), outputs = weight.size(0), rows = x.numel() / inputs;
  const auto* weights = static_cast<const typename Weights::Element*>(weight.const_data_ptr());
  std::vector<float> sums(rows * outputs);
  if (std::is_same_v<Weights, BFloat16Weights> && std::is_same_v<Input, c10::BFloat16> && rows == 1) {
    run(static_cast<const uint16_t*>(weight.const_data_ptr()), inputs, outputs,
        static_cast<const uint16_t*>(x.const_data_ptr()), sums.data());
  } else {
    std::vector<float> first(rows * inputs / 2), second(rows * inputs / 2);
    split<Weights, Input>(x.const_data_ptr<Input>(), rows, inputs, first.data(), second.data());
    run<Weights>(weights, inputs, outputs, rows, first.data(), second.data(), sums.data());
  }
  const at::Tensor factors = scale.has_value() ? scale->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor shifts = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const float* factor = factors.defined() ? factors.const_data_ptr<float>() : nullptr;
  const float* shift = shifts.defined() ? shifts.const_data_ptr<float>() : nullptr;
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor out = at::empty(shape, x.options());
  Input* to = out.mutable_data_ptr<Input>();
  for (int64_t m = 0; m < rows; m++)
    for (int64_t n = 0; n < outputs; n++) {
      const float sum = sums[m * outputs + n];
      to[m * outputs + n] = static_cast<Input>((factor ? factor[n] * sum : sum) + (shift ? shift[n] : 0.0f));
    }
  return out;
}

template <class Weights>
at::Tensor dispatch(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                    const std::optional<at::Tensor>& bias) {
  if (input.scalar_type() == at::kBFloat16) return few_rows<Weights, c10::BFloat16>(input, weight, scale, bias);
  if (input.scalar_type() == at::kFloat) return few_rows<Weights, float>(input, weight, scale, bias);
  return few_rows<Weights, float>(input.to(at::kFloat), weight, scale, bias).to(input.scalar_type());
}

void check(const at::Tensor& input, const at::Tensor& weight, at::ScalarType type) {
  TORCH_CHECK(weight.scalar_type() == type && weight.dim() == 2 && weight.is_contiguous(),
              "linear: the weight must be a contiguous matrix of its type");
  TORCH_CHECK(input.size(-1) == weight.size(1) && weight.size(1) % PAIR == 0,
              "linear: inputs must be as many as the weight's and a multiple of 16");
}

at::Tensor linear_bf16(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check(input, weight, at::kBFloat16);
  return dispatch<BFloat16Weights>(input, weight, std::nullopt, bias);
}

at::Tensor linear_int8(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& bias) {
  check(input, weight, at::kChar);
  return dispatch<Int8Weights>(input, weight, scale, bias);
}

// Attention of few queries over a cache in bf16, read once: per row and KV head, the queries of its group.
//
// q [B, H, G, K], k and v [B, H, C, K] (strided in B and H, rows of K contiguous), mask [B, G, C]: out [B, H, G, K].
// Scores, their softmax (with the maximum subtracted) and the sum of values are in fp32.
void attend(const float* q, const uint16_t* k, const uint16_t* v, int64_t stride, const bool* mask, int64_t queries,
            int64_t columns, int64_t width, float scale, float* scores, float* out) {
  for (int64_t c = 0; c < columns; c++) {
    const uint16_t* key = k + c * stride;
    for (int64_t g = 0; g < queries; g++) {
      if (!mask[g * columns + c]) {
        scores[g * columns + c] = -INFINITY;
        continue;
      }
      Floats sum = Floats{};
      for (int64_t i = 0; i < width; i += PAIR) {
        Floats a, b;
        BFloat16Weights::load(key + i, a, b);
        sum += a * *reinterpret_cast<const Floats*>(q + g * width + i);
        sum += b * *reinterpret_cast<const Floats*>(q + g * width + i + VECTOR);
      }
      scores[g * columns + c] = scale * total(sum);
    }
  }
  for (int64_t g = 0; g < queries; g++) {
    float* line = scores + g * columns;
    const float most = *std::max_element(line, line + columns);
    float sum = 0;
    for (int64_t c = 0; c < columns; c++) sum += line[c] = line[c] == -INFINITY ? 0.0f : std::exp(line[c] - most);
    for (int64_t c = 0; c < columns; c++) line[c] /= sum;
  }
  std::fill(out, out + queries * width, 0.0f);
  for (int64_t c = 0; c < columns; c++)
    for (int64_t i = 0; i < width; i += PAIR) {
      Floats a, b;
      BFloat16Weights::load(v + c * stride + i, a, b);
      for (int64_t g = 0; g < queries; g++) {
        const float weight = scores[g * columns + c];
        *reinterpret_cast<Floats*>(out + g * width + i) += weight * a;
        *reinterpret_cast<Floats*>(out + g * width + i + VECTOR) += weight * b;
      }
    }
}

// query [B, Q, N, K] with Q heads in groups that share one of the H heads of key and value [B, H, C, K]; mask
// [B, 1, N, C]; result [B, N, Q, K]. A group's queries are stacked, group by group of N.
at::Tensor grouped_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const at::Tensor& mask, double scale) {
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2), width = query.size(3);
  const int64_t shared = key.size(1), columns = key.size(2), stride = key.stride(2), groups = heads / shared;
  TORCH_CHECK(query.scalar_type() == at::kBFloat16 && key.scalar_type() == at::kBFloat16 &&
                  value.scalar_type() == at::kBFloat16 && width % PAIR == 0,
              "grouped_attention: queries, keys and values must be bf16, with a multiple of 16 channels per head");
  TORCH_CHECK(key.stride(3) == 1 && value.strides() == key.strides() && query.stride(3) == 1,
              "grouped_attention: channels must be contiguous");
  const at::Tensor seen = mask.contiguous();
  const int64_t queries = groups * length;
  at::Tensor out = at::empty({batch, length, heads, width}, query.options());
  auto* to = out.mutable_data_ptr<c10::BFloat16>();
  const auto* from = query.const_data_ptr<c10::BFloat16>();
  const auto* keys = static_cast<const uint16_t*>(key.const_data_ptr());
  const auto* values = static_cast<const uint16_t*>(value.const_data_ptr());
  share(batch * shared, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> stacked(queries * width), scores(queries * columns), sums(queries * width);
    const std::unique_ptr<bool[]> visible(new bool[queries * columns]);
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / shared, head = i % shared, first = row * key.stride(0) + head * key.stride(1);
      for (int64_t g = 0; g < queries; g++) {
        const int64_t own = head * groups + g / length, place = g % length;
        const auto* line = from + row * query.stride(0) + own * query.stride(1) + place * query.stride(2);
        // Even and odd channels of each sixteen apart, as keys and values come out of their format.
        split<BFloat16Weights>(line, 1, width, sums.data(), sums.data() + width / 2);
        for (int64_t k = 0; k < width; k++)
          stacked[g * width + k] = sums[k / VECTOR % 2 * (width / 2) + k / PAIR * VECTOR + k % VECTOR];
        std::copy_n(seen.const_data_ptr<bool>() + (row * length + place) * columns, columns,
                    visible.get() + g * columns);
      }
      attend(stacked.data(), keys + first, values + first, stride, visible.get(), queries, columns, width,
             static_cast<float>(scale), scores.data(), sums.data());
      for (int64_t g = 0; g < queries; g++) {
        const int64_t own = head * groups + g / length, place = g % length;
        auto* line = to + ((row * length + place) * heads + own) * width;
        for (int64_t k = 0; k < width; k++) // the even channels of sixteen come first, then the odd ones
          line[k] = static_cast<c10::BFloat16>(sums[g * width + k / PAIR * PAIR + k % 2 * VECTOR + k % PAIR / 2]);
      }
    }
  });
  return out;
}

} // namespace

TORCH_LIBRARY(overfill, library) {
  library.def("linear_bf16(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  library.def("linear_int8(Tensor input, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");
  library.def("grouped_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(overfill, CPU, library) {
  library.impl("linear_bf16", linear_bf16);
  library.impl("linear_int8", linear_int8);
  library.impl("grouped_attention", grouped_attention);
}
