// Attention of rows that read one token: each row's own columns, an online softmax in float32.
//
// The columns that a row sees are taken in order, CHUNK at a time, whatever lies between them. So a row's result
// depends neither on the rows beside it and the padding that they cause, nor on who computes which chunk.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;

constexpr int64_t CHUNK = 128;              // columns
constexpr int64_t WORTH_THREADS = 1 << 18;  // products, beyond which a second thread gains
constexpr float HIDDEN = -1e30f;            // a mask that adds this or less hides

#ifdef __AVX512F__

using Floats = __m512;
constexpr int64_t LANES = 16, TILE = 4, WIDE = 4;  // numbers in a register, queries and registers of values at a time

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load(const BFloat16* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where one is NaN
inline Floats rounded(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }
inline float total(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }

// The sums of four registers.
inline __m128 totals(Floats a, Floats b, Floats c, Floats d) {
  const Floats ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Floats cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Floats all = add(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#else

using Floats = __m256;
constexpr int64_t LANES = 8, TILE = 2, WIDE = 4;

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline Floats load(const BFloat16* from) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats rounded(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power(Floats x, Floats power) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
  return multiply(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline float largest(Floats x) {
  alignas(32) float each[LANES];
  store(each, x);
  return *std::max_element(each, each + LANES);
}
inline __m128 totals(Floats a, Floats b, Floats c, Floats d) {
  const Floats all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
inline float total(Floats x) { return _mm_cvtss_f32(totals(x, x, x, x)); }

#endif

// What a product of queries and keys reads at a time: `Operand<T>::COUNT` numbers.
template <class T>
struct Operand {
  static constexpr int64_t COUNT = LANES;
  Floats x;
  explicit Operand(const T* from) : x(load(from)) {}
  Floats dot(const Operand& other, Floats sum) const { return fused(x, other.x, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Operand<BFloat16> {
  static constexpr int64_t COUNT = 2 * LANES;
  __m512i x;
  explicit Operand(const BFloat16* from) : x(_mm512_loadu_si512(from)) {}
  Floats dot(const Operand& other, Floats sum) const {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(other.x));
  }
};
#endif

// The first `count` numbers, and zeros behind them.
template <class T, int64_t N>
struct Padded {
  alignas(64) T numbers[N] = {};
  Padded(const T* from, int64_t count) { std::memcpy(numbers, from, count * sizeof(T)); }
};

// For x of at most 0, or NaN; what is below -87 counts as that.
inline Floats exponential(Floats x) {
  x = larger(splat(-87.0f), x);
  const Floats power = rounded(multiply(x, splat(1.44269504f)));
  const Floats rest = fused(power, splat(2.12194440e-4f), fused(power, splat(-0.693359375f), x));
  Floats sum = splat(1.9875691500e-4f);
  for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = fused(sum, rest, splat(factor));
  return times_power(fused(multiply(sum, rest), rest, add(rest, splat(1.0f))), power);
}

// Scores of Q queries with four keys. *Shape:* of `scores`: Q rows of CHUNK.
template <int64_t Q, class T>
void dots(const T* const* queries, const T* const* keys, int64_t size, float* scores) {
  constexpr int64_t N = Operand<T>::COUNT;
  Floats sums[Q][4];
  for (auto& some : sums) std::fill(some, some + 4, splat(0.0f));
  const auto step = [&](const auto& at) {
    const Operand<T> four[4] = {at(keys[0]), at(keys[1]), at(keys[2]), at(keys[3])};
    for (int64_t q = 0; q < Q; ++q) {
      const Operand<T> query = at(queries[q]);
      for (int64_t k = 0; k < 4; ++k) sums[q][k] = query.dot(four[k], sums[q][k]);
    }
  };
  int64_t begin = 0;
  for (; begin + N <= size; begin += N) step([&](const T* from) { return Operand<T>(from + begin); });
  if (begin < size)
    step([&](const T* from) { return Operand<T>(Padded<T, N>(from + begin, size - begin).numbers); });
  for (int64_t q = 0; q < Q; ++q)
    _mm_storeu_ps(scores + q * CHUNK, totals(sums[q][0], sums[q][1], sums[q][2], sums[q][3]));
}

// Sums of values, weighted for Q queries, in V registers each; of the last one only `part` numbers exist.
template <int64_t Q, int64_t V, class T>
void weigh(const float* weights, const T* const* values, int64_t count, int64_t begin, int64_t part, float* sums,
           int64_t size) {
  Floats found[Q][V];
  for (auto& some : found) std::fill(some, some + V, splat(0.0f));
  for (int64_t column = 0; column < count; ++column) {
    Floats value[V];
    for (int64_t v = 0; v < V; ++v) {
      const T* from = values[column] + begin + v * LANES;
      value[v] = part == LANES ? load(from) : load(Padded<T, LANES>(from, part).numbers);
    }
    for (int64_t q = 0; q < Q; ++q) {
      const Floats weight = splat(weights[q * CHUNK + column]);
      for (int64_t v = 0; v < V; ++v) found[q][v] = fused(weight, value[v], found[q][v]);
    }
  }
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t v = 0; v < V; ++v) {
      alignas(64) float each[LANES];
      store(each, found[q][v]);
      std::memcpy(sums + q * size + begin + v * LANES, each, part * sizeof(float));
    }
}

// Numbers that are added to scores, of any float kind.
struct Added {
  const float* wide = nullptr;
  const BFloat16* half = nullptr;
  int64_t row = 0, head = 0;

  explicit Added(const std::optional<Tensor>& given) {
    if (!given || given->scalar_type() == at::kBool) return;
    if (given->scalar_type() == at::kFloat) wide = given->const_data_ptr<float>();
    else half = given->const_data_ptr<BFloat16>();
    row = given->size(0) > 1 ? given->stride(0) : 0;
    head = given->size(1) > 1 ? given->stride(1) : 0;
  }
  bool any() const { return wide || half; }
  float at(int64_t place) const { return std::max(wide ? wide[place] : static_cast<float>(half[place]), HIDDEN); }
};

// The columns that rows see, as runs. A row that sees none has all of them, with scores that are alike.
struct Visible {
  struct Row {
    std::vector<std::pair<int64_t, int64_t>> runs;
    int64_t count = 0;
    bool alike = false;

    template <class Sees>
    void find(int64_t width, const Sees& sees) {
      for (int64_t column = 0; column < width; ++column) {
        const int64_t begin = column;
        while (column < width && sees(column)) ++column;
        if (column > begin) runs.emplace_back(begin, column);
      }
    }

    // Write the columns of a chunk; return how many those are.
    int64_t chunk(int64_t number, int64_t* columns) const {
      int64_t skipped = number * CHUNK, found = 0;
      for (const auto& [begin, end] : runs) {
        for (int64_t column = begin + std::min(skipped, end - begin); column < end && found < CHUNK; ++column)
          columns[found++] = column;
        skipped -= std::min(skipped, end - begin);
      }
      return found;
    }
  };
  std::vector<Row> rows;  // one, if it stands for all

  // Of every `step`th row of a mask.
  Visible(const std::optional<Tensor>& mask, int64_t step, int64_t width) {
    const Added added(mask);
    rows.resize(mask && mask->size(0) > 1 ? mask->size(0) / step : 1);
    for (size_t number = 0; number < rows.size(); ++number) {
      Row& row = rows[number];
      if (mask && mask->scalar_type() == at::kBool) {
        const bool* seen = mask->const_data_ptr<bool>() + number * step * mask->stride(0);
        row.find(width, [&](int64_t column) { return seen[column]; });
      } else if (mask) {
        row.find(width, [&](int64_t column) { return added.at(number * step * added.row + column) > HIDDEN; });
      }
      row.alike = mask && row.runs.empty();
      if (row.runs.empty()) row.runs.emplace_back(0, width);
      for (const auto& [begin, end] : row.runs) row.count += end - begin;
    }
  }

  const Row& of(int64_t row) const { return rows[rows.size() > 1 ? row : 0]; }
};
// What some columns give a query: their largest score, the sum of weights relative to it, and that of values.
struct Part {
  float most, weight;
  float* values;

  __attribute__((noinline)) void take(const Part& other, int64_t size) {  // inlined twice, it might round in two ways
    const float both = std::max(most, other.most);
    const float mine = std::exp(most - both), theirs = std::exp(other.most - both);
    most = both;
    weight = weight * mine + other.weight * theirs;
    for (int64_t d = 0; d < size; ++d) values[d] = values[d] * mine + other.values[d] * theirs;
  }
};

template <class T>
struct Attention {
  const Tensor &query, &key, &value;
  const Added mask, bias;
  const float* sinks;
  const float scale, softcap;
  const Visible visible;
  Tensor& attended;

  const int64_t heads = query.size(1), size = query.size(3), groups = key.size(1), value_size = value.size(3);
  const int64_t beams = query.size(0) / key.size(0), share = heads / groups, asking = beams * share;

  int64_t row_of(int64_t source, int64_t q) const { return source * beams + q / share; }
  int64_t head_of(int64_t group, int64_t q) const { return group * share + q % share; }

  // What a chunk of columns gives the queries `first` to `first + Q` of a group.
  template <int64_t Q>
  void chunk(int64_t source, int64_t group, int64_t first, const int64_t* columns, int64_t count, Part* parts) const {
    const T* queries[Q];
    const T* rows[CHUNK + 3];
    alignas(64) float scores[Q * CHUNK];
    const bool alike = visible.of(source).alike;
    for (int64_t q = 0; q < Q; ++q)
      queries[q] = query.const_data_ptr<T>() + row_of(source, first + q) * query.stride(0) +
                   head_of(group, first + q) * query.stride(1);
    lay(key, source, group, columns, count, rows);
    for (int64_t column = 0; column < count; column += 4) dots<Q>(queries, rows + column, size, scores + column);
    for (int64_t q = 0; q < Q; ++q) {
      float* row = scores + q * CHUNK;
      if (alike) std::fill(row, row + count, 0.0f);
      else adjust(source, group, first + q, columns, count, row);
      weights(row, count, parts[q]);
    }
    lay(value, source, group, columns, count, rows);
    int64_t begin = 0;
    for (; begin + WIDE * LANES <= value_size; begin += WIDE * LANES)
      weigh<Q, WIDE>(scores, rows, count, begin, LANES, parts[0].values, value_size);
    for (; begin < value_size; begin += LANES)
      weigh<Q, 1>(scores, rows, count, begin, std::min(LANES, value_size - begin), parts[0].values, value_size);
  }

  // Write where columns of keys or values lie, and the last of them three times more.
  void lay(const Tensor& states, int64_t source, int64_t group, const int64_t* columns, int64_t count,
           const T** rows) const {
    const T* base = states.const_data_ptr<T>() + source * states.stride(0) + group * states.stride(1);
    for (int64_t column = 0; column < count; ++column) rows[column] = base + columns[column] * states.stride(2);
    std::fill(rows + count, rows + count + 3, rows[count - 1]);
  }

  // Scale a query's scores, cap them, and add what is to be added.
  void adjust(int64_t source, int64_t group, int64_t q, const int64_t* columns, int64_t count, float* scores) const {
    for (int64_t column = 0; column < count; column += LANES)
      store(scores + column, multiply(load(scores + column), splat(scale)));
    if (softcap > 0)
      for (int64_t column = 0; column < count; ++column) scores[column] = softcap * std::tanh(scores[column] / softcap);
    for (const Added& added : {mask, bias})
      if (added.any()) {
        const int64_t place = row_of(source, q) * added.row + head_of(group, q) * added.head;
        for (int64_t column = 0; column < count; ++column) scores[column] += added.at(place + columns[column]);
      }
  }

  // Turn scores into weights.
  static void weights(float* scores, int64_t count, Part& part) {
    const int64_t whole = (count + LANES - 1) / LANES * LANES;
    std::fill(scores + count, scores + whole, -std::numeric_limits<float>::infinity());
    Floats most = load(scores), sum = splat(0.0f);
    for (int64_t column = LANES; column < whole; column += LANES) most = larger(most, load(scores + column));
    part.most = largest(most);
    for (int64_t column = 0; column < whole; column += LANES) {
      const Floats weight = exponential(add(load(scores + column), splat(-part.most)));
      store(scores + column, weight);
      sum = add(sum, weight);
    }
    part.weight = total(sum);
  }

  // What a chunk gives all queries of a group.
  void all(int64_t source, int64_t group, int64_t number, Part* parts) const {
    int64_t columns[CHUNK];
    const int64_t count = visible.of(source).chunk(number, columns);
    for (int64_t first = 0; first < asking; first += TILE) {
      Part* some = parts + first;
      switch (std::min(TILE, asking - first)) {
        case 1: chunk<1>(source, group, first, columns, count, some); break;
        case 2: chunk<2>(source, group, first, columns, count, some); break;
        case 3: chunk<3>(source, group, first, columns, count, some); break;
        default: chunk<4>(source, group, first, columns, count, some);
      }
    }
  }

  // Write what the chunks of a group have given together.
  void finish(int64_t source, int64_t group, const std::vector<Part>& parts) const {
    for (int64_t q = 0; q < asking; ++q) {
      const int64_t head = head_of(group, q);
      float weight = parts[q].weight;
      if (sinks) weight += std::exp(sinks[head] - parts[q].most);
      const float inverse = 1.0f / weight;
      T* to = attended.mutable_data_ptr<T>() + (row_of(source, q) * heads + head) * value_size;
      for (int64_t d = 0; d < value_size; ++d) to[d] = static_cast<T>(parts[q].values[d] * inverse);
    }
  }

  // Room for what some chunks give all queries.
  struct Room {
    std::vector<float> memory;
    std::vector<Part> parts;
    Room(int64_t count, int64_t size) : memory(count * size), parts(count) {
      for (int64_t number = 0; number < count; ++number) parts[number].values = memory.data() + number * size;
    }
  };

  int64_t chunks(int64_t source) const { return (visible.of(source).count + CHUNK - 1) / CHUNK; }

  // Let threads take tasks as they come to them: rows are not equally long.
  template <class Work>
  void share_out(int64_t tasks, const Work& work) const {
    int64_t columns = 0;
    for (int64_t source = 0; source < key.size(0); ++source) columns += visible.of(source).count;
    const bool few = columns * heads * beams * (size + value_size) < WORTH_THREADS;
    std::atomic<int64_t> next{0};
    at::parallel_for(0, few ? 1 : at::get_num_threads(), 1, [&](int64_t, int64_t) {
      Room room(2 * asking, value_size);
      for (int64_t task = next++; task < tasks; task = next++) work(task, room.parts);
    });
  }

  void run() const {
    const int64_t tasks = key.size(0) * groups;
    if (tasks < 4 * at::get_num_threads()) return run_chunks(tasks);
    share_out(tasks, [&](int64_t task, std::vector<Part>& parts) {
      const int64_t source = task / groups, group = task % groups;
      all(source, group, 0, parts.data());
      for (int64_t number = 1; number < chunks(source); ++number) {
        all(source, group, number, parts.data() + asking);
        for (int64_t q = 0; q < asking; ++q) parts[q].take(parts[asking + q], value_size);
      }
      finish(source, group, parts);
    });
  }

  // The same, with the chunks of one group by several threads.
  void run_chunks(int64_t groups_of_all) const {
    const int64_t most = (key.size(2) + CHUNK - 1) / CHUNK;
    std::vector<Room> rooms(groups_of_all, Room(0, 0));
    for (int64_t task = 0; task < groups_of_all; ++task) rooms[task] = Room(chunks(task / groups) * asking, value_size);
    share_out(groups_of_all * most, [&](int64_t task, std::vector<Part>&) {
      const int64_t number = task % most, whole = task / most;
      if (number < chunks(whole / groups))
        all(whole / groups, whole % groups, number, rooms[whole].parts.data() + number * asking);
    });
    for (int64_t task = 0; task < groups_of_all; ++task) {
      std::vector<Part>& parts = rooms[task].parts;
      for (size_t later = asking; later < parts.size(); ++later) parts[later % asking].take(parts[later], value_size);
      finish(task / groups, task % groups, parts);
    }
  }
};

// The same tensor, or a copy whose numbers lie side by side.
Tensor dense(const Tensor& given) { return given.size(-1) == 1 || given.stride(-1) == 1 ? given : given.contiguous(); }

// What is added or hides, of a kind that is read here.
std::optional<Tensor> dense(const std::optional<Tensor>& given) {
  if (!given) return given;
  const auto kind = given->scalar_type();
  const bool read = kind == at::kBool || kind == at::kFloat || kind == at::kBFloat16;
  return dense(read ? *given : given->to(at::kFloat));
}

// *Shape:* of the query `(rows, heads, 1, size)`; of keys and values `(sources, groups, columns, size)`, where rows of
// one source lie side by side; of the mask, bool or added, `(1 or rows, 1, 1, columns)`, that of a source's first row
// counts; of the bias `(1 or rows, 1 or heads, 1, columns)`; of sinks, scores of no value, `(heads)`; of what is
// returned `(rows, 1, heads, size)`. A `softcap` of 0 is none.
Tensor attend_one(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& sinks, double scale,
                  double softcap) {
  const auto kind = query.scalar_type();
  TORCH_CHECK((kind == at::kFloat || kind == at::kBFloat16) && key.scalar_type() == kind && value.scalar_type() == kind,
              "attend_one: query, key and value are float32 or bfloat16");
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && query.size(2) == 1 &&
                  key.size(0) > 0 && query.size(0) % key.size(0) == 0 && query.size(1) % key.size(1) == 0 &&
                  query.size(3) == key.size(3) && key.sizes().slice(0, 3) == value.sizes().slice(0, 3),
              "attend_one: the shapes do not fit");
  for (const auto& [given, heads] : {std::pair(mask, int64_t{1}), std::pair(bias, query.size(1))})
    TORCH_CHECK(!given || (given->dim() == 4 && (given->size(0) == 1 || given->size(0) == query.size(0)) &&
                           (given->size(1) == 1 || given->size(1) == heads) && given->size(2) == 1 &&
                           given->size(3) == key.size(2)),
                "attend_one: the mask or bias does not fit");
  TORCH_CHECK(!sinks || (sinks->dim() == 1 && sinks->size(0) == query.size(1)), "attend_one: the sinks do not fit");
  Tensor attended = at::empty({query.size(0), 1, query.size(1), value.size(3)}, query.options());
  if (!attended.numel()) return attended;
  if (!key.size(2)) return attended.zero_();
  const Tensor own_query = dense(query), own_key = dense(key), own_value = dense(value);
  const auto own_mask = dense(mask), own_bias = dense(bias);
  const auto own_sinks = sinks ? std::optional(sinks->to(at::kFloat).contiguous()) : sinks;
  const auto with = [&](auto type) {
    const float* sink = sinks ? own_sinks->const_data_ptr<float>() : nullptr;
    Attention<decltype(type)>{own_query, own_key, own_value, Added(own_mask), Added(own_bias), sink,
                              static_cast<float>(scale), static_cast<float>(softcap),
                              Visible(own_mask, query.size(0) / key.size(0), key.size(2)), attended}
        .run();
  };
  kind == at::kFloat ? with(float()) : with(BFloat16());
  return attended;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lmkit, library) {
  library.def(
      "attend_one(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? sinks, float scale, "
      "float softcap) -> Tensor");
}
TORCH_LIBRARY_IMPL(lmkit, CPU, library) { library.impl("attend_one", attend_one); }
