// Attention of rows that read one token: each row's own columns, an online softmax in float32.
//
// The columns that a row sees are taken in order, CHUNK at a time, whatever lies between them. So a row's result
// depends neither on the rows beside it and the padding that they cause, nor on who computes which chunk.

#include <atomic>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "attention.h"

namespace {

using namespace lmkit;

constexpr int64_t CHUNK = 128;                  // columns
constexpr int64_t TILE = LANES == 16 ? 4 : 2;   // queries at a time, as many sums as there are registers for
constexpr int64_t WIDE = 4;                     // registers of values at a time
constexpr int64_t WORTH = 1 << 18;              // multiplications that make it worth to wake a thread

// What a product of queries and keys reads at a time: `Operand<T>::COUNT` numbers.
template <class T>
struct Operand {
  static constexpr int64_t COUNT = LANES;
  Floats x;
  explicit Operand(const T* from) : x(load_widened(from)) {}
  Floats dot(const Operand& other, Floats sum) const { return fused(x, other.x, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Operand<uint16_t> {
  static constexpr int64_t COUNT = 2 * LANES;
  Ints x;
  explicit Operand(const uint16_t* from) : x(load(from)) {}
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

// Scores of Q queries with four keys. *Shape:* of `scores`: Q rows of CHUNK.
template <int64_t Q, class T>
void dots(const T* const* queries, const T* const* keys, int64_t size, float* scores) {
  constexpr int64_t N = Operand<T>::COUNT;
  Floats found[Q][4];
  for (auto& some : found) std::fill(some, some + 4, splat(0.0f));
  const auto step = [&](const auto& at) {
    const Operand<T> four[4] = {at(keys[0]), at(keys[1]), at(keys[2]), at(keys[3])};
    for (int64_t q = 0; q < Q; ++q) {
      const Operand<T> query = at(queries[q]);
      for (int64_t k = 0; k < 4; ++k) found[q][k] = query.dot(four[k], found[q][k]);
    }
  };
  int64_t begin = 0;
  for (; begin + N <= size; begin += N) step([&](const T* from) { return Operand<T>(from + begin); });
  if (begin < size)
    step([&](const T* from) { return Operand<T>(Padded<T, N>(from + begin, size - begin).numbers); });
  for (int64_t q = 0; q < Q; ++q)
    _mm_storeu_ps(scores + q * CHUNK, sums(found[q][0], found[q][1], found[q][2], found[q][3]));
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
      value[v] = V > 1 || part == LANES ? load_widened(from) : load_widened(Padded<T, LANES>(from, part).numbers);
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
  const uint16_t* half = nullptr;
  int64_t row = 0, head = 0;

  explicit Added(const Given& given) {
    if (!given || given->scalar_type() == ScalarType::Bool) return;
    const void* data = given->const_data_ptr();
    if (given->scalar_type() == ScalarType::Float) wide = static_cast<const float*>(data);
    else half = static_cast<const uint16_t*>(data);
    row = given->size(0) > 1 ? given->stride(0) : 0;
    head = given->size(1) > 1 ? given->stride(1) : 0;
  }
  bool any() const { return wide || half; }
  float at(int64_t place) const { return std::max(wide ? wide[place] : widened(half[place]), HIDDEN); }
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
  Visible(const Given& mask, int64_t step, int64_t width) {
    const Added added(mask);
    rows.resize(mask && mask->size(0) > 1 ? mask->size(0) / step : 1);
    for (size_t number = 0; number < rows.size(); ++number) {
      Row& row = rows[number];
      if (mask && mask->scalar_type() == ScalarType::Bool) {
        const bool* seen = static_cast<const bool*>(mask->const_data_ptr()) + number * step * mask->stride(0);
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

// Queries, keys or values.
template <class T>
struct States {
  const T* data;
  int64_t row, head, column;

  explicit States(const Tensor& given)
      : data(static_cast<const T*>(given.const_data_ptr())), row(given.stride(0)), head(given.stride(1)),
        column(given.stride(2)) {}
};

// What some columns give a query: their largest score, the sum of weights relative to it, and that of values.
struct Part {
  float most, weight;
  float* values;

  void take(const Part& other, int64_t size) {
    const float both = std::max(most, other.most);
    const float mine = std::exp(most - both), theirs = std::exp(other.most - both);
    most = both;
    weight = weight * mine + other.weight * theirs;
    for (int64_t d = 0; d < size; ++d) values[d] = values[d] * mine + other.values[d] * theirs;
  }
};

template <class T>
struct Attention {
  const States<T> query, key, value;
  const Added mask, bias;
  const float* sinks;
  const float scale, softcap;
  const Visible visible;
  T* const attended;
  const int64_t sources, groups, beams, share, size, value_size;

  const int64_t heads = groups * share, asking = beams * share, threads = torch::stable::get_num_threads();

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
      queries[q] = query.data + row_of(source, first + q) * query.row + head_of(group, first + q) * query.head;
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
      weigh<Q, 1>(scores, rows, count, begin, std::min<int64_t>(LANES, value_size - begin), parts[0].values, value_size);
  }

  // Write where columns of keys or values lie, and the last of them three times more.
  static void lay(const States<T>& states, int64_t source, int64_t group, const int64_t* columns, int64_t count,
                  const T** rows) {
    const T* base = states.data + source * states.row + group * states.head;
    for (int64_t column = 0; column < count; ++column) rows[column] = base + columns[column] * states.column;
    std::fill(rows + count, rows + count + 3, rows[count - 1]);
  }

  // Scale a query's scores, cap them, and add what is to be added.
  void adjust(int64_t source, int64_t group, int64_t q, const int64_t* columns, int64_t count, float* scores) const {
    for (int64_t column = 0; column < count; column += LANES)
      store(scores + column, times(load_floats(scores + column), splat(scale)));
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
    Floats most = load_floats(scores), total = splat(0.0f);
    for (int64_t column = LANES; column < whole; column += LANES) most = larger(most, load_floats(scores + column));
    part.most = largest(most);
    for (int64_t column = 0; column < whole; column += LANES) {
      const Floats weight = exponential(add(load_floats(scores + column), splat(-part.most)));
      store(scores + column, weight);
      total = add(total, weight);
    }
    part.weight = sum(total);
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
      T* to = attended + (row_of(source, q) * heads + head) * value_size;
      for (int64_t d = 0; d < value_size; ++d) narrow(parts[q].values[d] * inverse, to[d]);
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
    for (int64_t source = 0; source < sources; ++source) columns += visible.of(source).count;
    const bool few = columns * heads * beams * (size + value_size) < WORTH;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, few ? 1 : threads, 1, [&](int64_t, int64_t) {
      Room room(2 * asking, value_size);
      for (int64_t task = next++; task < tasks; task = next++) work(task, room.parts);
    });
  }

  void run() const {
    const int64_t tasks = sources * groups;
    if (tasks < 4 * threads) return run_chunks(tasks);
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
    int64_t most = 0;
    std::vector<Room> rooms;
    for (int64_t task = 0; task < groups_of_all; ++task) {
      most = std::max(most, chunks(task / groups));
      rooms.emplace_back(chunks(task / groups) * asking, value_size);
    }
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

template <typename T>
void attend(const Tensor& query, const Tensor& key, const Tensor& value, const Given& mask, const Given& bias,
            const Given& sinks, double scale, double softcap, Tensor& to) {
  const int64_t beams = query.size(0) / key.size(0), share = query.size(1) / key.size(1);
  const float* sink = sinks ? static_cast<const float*>(sinks->const_data_ptr()) : nullptr;
  Attention<T>{States<T>(query), States<T>(key), States<T>(value), Added(mask), Added(bias), sink,
               static_cast<float>(scale), static_cast<float>(softcap), Visible(mask, beams, key.size(2)),
               static_cast<T*>(to.mutable_data_ptr()), key.size(0), key.size(1), beams, share, key.size(3), value.size(3)}
      .run();
}

// *Shape:* of the query `(rows, heads, 1, size)`; of keys and values `(sources, groups, columns, size)`, where rows of
// one source lie side by side; of the mask, bool or added, `(1 or rows, 1, 1, columns)`, that of a source's first row
// counts; of the bias `(1 or rows, 1 or heads, 1, columns)`; of sinks, which are scores of no value, `(heads)`; of what
// is returned `(rows, 1, heads, size)`. A cap of 0 is none.
Tensor attend_one(const Tensor& query, const Tensor& key, const Tensor& value, const Given& mask, const Given& bias,
                  const Given& sinks, double scale, double softcap) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && key.scalar_type() == dtype &&
                      value.scalar_type() == dtype, "queries, keys and values are float32 or bfloat16");
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && query.size(2) == 1 && key.size(0) &&
                      query.size(0) % key.size(0) == 0 && key.size(1) && query.size(1) % key.size(1) == 0 &&
                      query.size(3) == key.size(3) && key.sizes().slice(0, 3) == value.sizes().slice(0, 3),
                  "queries, keys and values do not fit");
  STD_TORCH_CHECK(!sinks || (sinks->dim() == 1 && sinks->size(0) == query.size(1)), "a sink is there for each head");
  Tensor to = torch::stable::new_empty(query, {query.size(0), 1, query.size(1), value.size(3)});
  if (!to.numel()) return to;
  if (!key.size(2)) return torch::stable::zero_(to);
  const Given wide = sinks ? dense(torch::stable::to(*sinks, ScalarType::Float)) : sinks;
  (dtype == ScalarType::Float ? attend<float> : attend<uint16_t>)(
      dense(query), dense(key), dense(value), dense(mask, query, 1, key.size(2)), dense(bias, query, query.size(1), key.size(2)), wide, scale,
      softcap, to);
  return to;
}

STABLE_TORCH_LIBRARY_FRAGMENT(LMKIT_OPERATORS, library) {
  library.def(
      "attend_one(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? sinks, float scale, "
      "float softcap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(LMKIT_OPERATORS, CPU, library) { library.impl("attend_one", TORCH_BOX(&attend_one)); }

}  // namespace
