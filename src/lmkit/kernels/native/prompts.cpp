// Attention of rows of several tokens in bfloat16: blocks of tokens and columns that stay in a core's cache, scores in
// float32 that are never written out, and blocks skipped that no token of them sees.
#if defined(__AVX512BF16__)

#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "amx.h"
#include "attention.h"

namespace {

using namespace lmkit;

constexpr int64_t TALL = 6, WIDE = 4;             // rows and registers that are computed at a time
constexpr int64_t TOKENS = 8 * TALL, COLUMNS = WIDE * LANES;  // of a block
#if defined(__AMX_BF16__)
constexpr int64_t STEP = TILE;  // pairs that are multiplied at a time: keys and queries are padded to that with zeros
#else
constexpr int64_t STEP = 1;
#endif
constexpr float LEAST = -std::numeric_limits<float>::infinity();

// Sums of products of TALL rows of pairs with N registers of outputs; `weights` has a line of pairs for each step.
template <int64_t N>
void multiply(const uint16_t* rows, int64_t row, const uint16_t* weights, int64_t line, int64_t pairs, float* to,
              int64_t length, bool add) {
  Floats sums[TALL][N];
  for (int64_t r = 0; r < TALL; ++r)
    for (int64_t n = 0; n < N; ++n) sums[r][n] = add ? load_floats(to + r * length + n * LANES) : splat(0.0f);
  for (int64_t pair = 0; pair < pairs; ++pair, weights += line) {
    __m512bh loaded[N];
    for (int64_t n = 0; n < N; ++n) loaded[n] = reinterpret_cast<__m512bh>(load(weights + n * 2 * LANES));
    for (int64_t r = 0; r < TALL; ++r) {
      int32_t two;
      std::memcpy(&two, rows + r * row + 2 * pair, 4);
      const __m512bh spread = reinterpret_cast<__m512bh>(splat(two));
      for (int64_t n = 0; n < N; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], spread, loaded[n]);
    }
  }
  for (int64_t r = 0; r < TALL; ++r)
    for (int64_t n = 0; n < N; ++n) store(to + r * length + n * LANES, sums[r][n]);
}

// The same for some rows, and for `wide` times as many outputs as a register holds.
void multiply(const uint16_t* rows, int64_t row, int64_t count, const uint16_t* weights, int64_t line, int64_t pairs,
              float* to, int64_t length, int64_t wide, bool add) {
  for (int64_t r = 0; r < count; r += TALL) {
    int64_t n = 0;
    for (; n + WIDE <= wide; n += WIDE)
      multiply<WIDE>(rows + r * row, row, weights + n * 2 * LANES, line, pairs, to + r * length + n * LANES, length, add);
    for (; n + 2 <= wide; n += 2)
      multiply<2>(rows + r * row, row, weights + n * 2 * LANES, line, pairs, to + r * length + n * LANES, length, add);
    for (; n < wide; ++n)
      multiply<1>(rows + r * row, row, weights + n * 2 * LANES, line, pairs, to + r * length + n * LANES, length, add);
  }
}

using Multiply = void (*)(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, int64_t, float*, int64_t, int64_t,
                          bool);

#if defined(__AMX_BF16__)

// The same by tiles: 0 to 2 are sums, 3 to 5 rows, 6 outputs.
template <int64_t TILES>
void by_tiles(const uint16_t* rows, int64_t row, const uint16_t* weights, int64_t line, int64_t pairs, float* to,
              int64_t length, int64_t wide, bool add) {
  const int64_t row_bytes = row * 2, line_bytes = line * 2, bytes = length * 4;
  all_is_written();
  for (int64_t n = 0; n < wide; ++n, to += LANES, weights += 2 * LANES) {
    if (add) {
      _tile_loadd(0, to, bytes);
      if constexpr (TILES > 1) _tile_loadd(1, to + TILE * length, bytes);
      if constexpr (TILES > 2) _tile_loadd(2, to + 2 * TILE * length, bytes);
    } else {
      _tile_zero(0);
      if constexpr (TILES > 1) _tile_zero(1);
      if constexpr (TILES > 2) _tile_zero(2);
    }
    for (int64_t pair = 0; pair < pairs; pair += STEP) {
      const uint16_t* from = rows + 2 * pair;
      _tile_loadd(6, weights + pair * line, line_bytes);
      _tile_loadd(3, from, row_bytes);
      if constexpr (TILES > 1) _tile_loadd(4, from + TILE * row, row_bytes);
      if constexpr (TILES > 2) _tile_loadd(5, from + 2 * TILE * row, row_bytes);
      _tile_dpbf16ps(0, 3, 6);
      if constexpr (TILES > 1) _tile_dpbf16ps(1, 4, 6);
      if constexpr (TILES > 2) _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, to, bytes);
    if constexpr (TILES > 1) _tile_stored(1, to + TILE * length, bytes);
    if constexpr (TILES > 2) _tile_stored(2, to + 2 * TILE * length, bytes);
  }
}

void by_tiles(const uint16_t* rows, int64_t row, int64_t count, const uint16_t* weights, int64_t line, int64_t pairs,
              float* to, int64_t length, int64_t wide, bool add) {
  static_assert(TOKENS == 3 * TILE, "a block has three tiles of tokens");
  constexpr decltype(&by_tiles<1>) BY[] = {by_tiles<1>, by_tiles<2>, by_tiles<3>};
  BY[(count - 1) / TILE](rows, row, weights, line, pairs, to, length, wide, add);
}

#endif

// Memory that begins at the beginning of a line of the cache.
struct Aligned {
  std::unique_ptr<char[]> memory;
  uint16_t* data;
  explicit Aligned(int64_t count) : memory(new char[count * 2 + 64]) {
    const uintptr_t place = reinterpret_cast<uintptr_t>(memory.get());
    data = reinterpret_cast<uint16_t*>((place + 63) / 64 * 64);
  }
};

// As many ones, of 64.
inline uint64_t first_bits(int64_t count) { return count <= 0 ? 0 : ~uint64_t{0} >> std::max<int64_t>(0, 64 - count); }

// A mask or a bias, of any shape that broadcasts.
struct Spread {
  const bool* seen = nullptr;
  const float* wide = nullptr;
  const uint16_t* half = nullptr;
  int64_t strides[4] = {};

  explicit Spread(const Given& given) {
    if (!given) return;
    const void* data = given->const_data_ptr();
    const ScalarType dtype = given->scalar_type();
    if (dtype == ScalarType::Bool) seen = static_cast<const bool*>(data);
    else if (dtype == ScalarType::Float) wide = static_cast<const float*>(data);
    else half = static_cast<const uint16_t*>(data);
    for (int64_t dim = 0; dim < 4; ++dim) strides[dim] = given->size(dim) > 1 ? given->stride(dim) : 0;
  }
  int64_t at(int64_t row, int64_t head, int64_t token) const {
    return row * strides[0] + head * strides[1] + token * strides[2];
  }
  // Which columns a token sees, as bits.
  uint64_t bits(int64_t place, int64_t columns) const {
    const __mmask64 there = first_bits(columns);
    return _mm512_mask_test_epi8_mask(there, _mm512_maskz_loadu_epi8(there, seen + place), splat(-1));
  }
  // Add to scores.
  void put(int64_t place, int64_t columns, float* scores) const {
    if (wide) for (int64_t c = 0; c < columns; ++c) scores[c] = std::max(scores[c] + wide[place + c], HIDDEN);
    if (half) for (int64_t c = 0; c < columns; ++c) scores[c] = std::max(scores[c] + widened(half[place + c]), HIDDEN);
  }
};

struct Prompts {
  const Tensor &query, &key, &value;
  const Spread mask, bias;
  const bool causal;
  const float scale;
  uint16_t* const attended;

  const int64_t rows = query.size(0), heads = query.size(1), tokens = query.size(2), size = query.size(3);
  const int64_t groups = key.size(1), columns = key.size(2), value_size = value.size(3);
  const int64_t pairs = (size + 2 * STEP - 1) / (2 * STEP) * STEP, length = (value_size + LANES - 1) / LANES * LANES;
  const int64_t blocks = (columns + COLUMNS - 1) / COLUMNS;
  const int64_t key_block = pairs * 2 * COLUMNS, value_block = COLUMNS * length;
  const Aligned keys{rows * groups * blocks * key_block}, values{rows * groups * blocks * value_block};

  // Bring a block of keys and values into the order of `multiply`: pairs of numbers, and pairs of columns.
  void pack(int64_t task) const {
    const int64_t number = task % blocks, group = task / blocks % groups, row = task / blocks / groups;
    const int64_t first = number * COLUMNS, count = std::min(COLUMNS, columns - first);
    uint16_t* to = keys.data + task * key_block;
    const int64_t step = key.stride(2), value_step = value.stride(2);
    const uint16_t* from = static_cast<const uint16_t*>(key.const_data_ptr()) + row * key.stride(0) +
                           group * key.stride(1) + first * step;
    std::fill(to, to + key_block, 0);
    for (int64_t pair = 0; pair < size / 2; ++pair)
      for (int64_t column = 0; column < count; ++column)
        std::memcpy(to + (pair * COLUMNS + column) * 2, from + column * step + 2 * pair, 4);
    if (size % 2)
      for (int64_t column = 0; column < count; ++column)
        to[(size / 2 * COLUMNS + column) * 2] = from[column * step + size - 1];
    to = values.data + task * value_block;
    from = static_cast<const uint16_t*>(value.const_data_ptr()) + row * value.stride(0) + group * value.stride(1) +
           first * value_step;
    std::fill(to, to + value_block, 0);
    for (int64_t column = 0; column < count; ++column)
      for (int64_t d = 0; d < value_size; ++d)
        to[column / 2 * 2 * length + 2 * d + column % 2] = from[column * value_step + d];
  }

  // Memory of a thread for one block.
  struct Room {
    alignas(64) uint16_t shares[TOKENS * COLUMNS];
    alignas(64) float scores[TOKENS * COLUMNS];
    alignas(64) float totals[TOKENS * LANES];
    float most[TOKENS];
    uint64_t seen[TOKENS];  // which columns
    std::vector<uint16_t> asking;
    std::vector<float> sums;
  };

  // Turn scores of a block, times `by`, into shares, relative to the largest score so far; what was summed before follows.
  void weigh(Room& room, int64_t count, int64_t wide, float by) const {
    for (int64_t token = 0; token < count; ++token) {
      float* scores = room.scores + token * COLUMNS;
      Floats most = load_floats(scores);
      for (int64_t n = 1; n < wide; ++n) most = larger(most, load_floats(scores + n * LANES));
      const float before = room.most[token], now = std::max(before, largest(most) * by);
      Floats total = load_floats(room.totals + token * LANES);
      if (now > before) {
        const Floats factor = exponential(splat(before - now));
        total = times(total, factor);
        float* sums = room.sums.data() + token * length;
        for (int64_t d = 0; d < length; d += LANES) store(sums + d, times(load_floats(sums + d), factor));
        room.most[token] = now;
      }
      for (int64_t n = 0; n < wide; n += 2) {
        const Floats first = exponential(add(times(load_floats(scores + n * LANES), splat(by)), splat(-now)));
        const Floats second = exponential(add(times(load_floats(scores + (n + 1) * LANES), splat(by)), splat(-now)));
        total = add(total, add(first, second));
        store(room.shares + token * COLUMNS + n * LANES, reinterpret_cast<Ints>(_mm512_cvtne2ps_pbh(second, first)));
      }
      store(room.totals + token * LANES, total);
    }
  }

  // Scale scores of a token, and add and hide what is to be.
  void adjust(int64_t row, int64_t head, int64_t token, int64_t first, int64_t wide, uint64_t seen, float* scores) const {
    for (int64_t c = 0; c < wide * LANES; ++c) scores[c] *= scale;
    const int64_t count = std::min(COLUMNS, columns - first);
    bias.put(bias.at(row, head, token) + first, count, scores);
    mask.put(mask.at(row, head, token) + first, count, scores);
    const uint64_t there = first_bits(count);
    for (int64_t n = 0; n < wide; ++n, scores += LANES, seen >>= LANES) {
      const Floats shown = _mm512_mask_blend_ps(static_cast<__mmask16>(seen), splat(HIDDEN), load_floats(scores));
      store(scores, _mm512_mask_blend_ps(static_cast<__mmask16>(there >> n * LANES), splat(LEAST), shown));
    }
  }

  // A block of tokens of a head.
  void attend(int64_t task, Room& room, Multiply by) const {
    const int64_t many = (tokens + TOKENS - 1) / TOKENS;
    const int64_t begin = (many - 1 - task / heads % many) * TOKENS, head = task % heads, row = task / heads / many;
    const int64_t count = std::min(TOKENS, tokens - begin), group = row * groups + head / (heads / groups);
    room.asking.assign(TOKENS * pairs * 2, 0);
    for (int64_t token = 0; token < count; ++token)
      std::memcpy(room.asking.data() + token * pairs * 2,
                  static_cast<const uint16_t*>(query.const_data_ptr()) + row * query.stride(0) + head * query.stride(1) +
                      (begin + token) * query.stride(2), size * 2);
    room.sums.assign(TOKENS * length, 0.0f);
    std::fill(room.totals, room.totals + TOKENS * LANES, 0.0f);
    std::fill(room.most, room.most + TOKENS, LEAST);
    for (int64_t number = 0; number < blocks; ++number) {
      const int64_t first = number * COLUMNS, last = std::min(first + COLUMNS, columns);
      if (causal && first >= begin + count) break;
      uint64_t some = 0, all = first_bits(last - first);
      for (int64_t token = 0; token < count; ++token) {
        uint64_t& seen = room.seen[token];
        seen = causal ? first_bits(begin + token + 1 - first) : ~uint64_t{0};
        if (mask.seen) seen &= mask.bits(mask.at(row, head, begin + token) + first, last - first);
        some |= seen, all &= seen;
      }
      if (!some) continue;
      const bool whole = all == ~uint64_t{0} && scale > 0 && !mask.wide && !mask.half && !bias.wide && !bias.half;
      const int64_t wide = (last - first + 2 * LANES - 1) / (2 * LANES) * 2;
      by(room.asking.data(), pairs * 2, count, keys.data + (group * blocks + number) * key_block, 2 * COLUMNS, pairs,
         room.scores, COLUMNS, wide, false);
      for (int64_t token = 0; token < count && !whole; ++token)
        adjust(row, head, begin + token, first, wide, room.seen[token], room.scores + token * COLUMNS);
      weigh(room, count, wide, whole ? scale : 1);
      by(room.shares, COLUMNS, count, values.data + (group * blocks + number) * value_block, 2 * length,
         wide * LANES / 2, room.sums.data(), length, length / LANES, true);
    }
    for (int64_t token = 0; token < count; ++token) {
      const float total = sum(load_floats(room.totals + token * LANES)), inverse = total > 0 ? 1 / total : total;
      uint16_t* to = attended + ((row * tokens + begin + token) * heads + head) * value_size;
      for (int64_t d = 0; d < value_size; ++d) narrow(room.sums[token * length + d] * inverse, to[d]);
    }
  }

  void run() const {
    const int64_t threads = torch::stable::get_num_threads();
    torch::stable::parallel_for(0, rows * groups * blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) pack(task);
    });
    std::atomic<int64_t> next{0};
    const int64_t tasks = rows * heads * ((tokens + TOKENS - 1) / TOKENS);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      const auto room = std::make_unique<Room>();
#if defined(__AMX_BF16__)
      if (has_tiles()) {
        const Tiles tiles(TILE);
        for (int64_t task = next++; task < tasks; task = next++) attend(task, *room, by_tiles);
        return;
      }
#endif
      for (int64_t task = next++; task < tasks; task = next++) attend(task, *room, multiply);
    });
  }
};

// *Shape:* of the query `(rows, heads, tokens, size)`; of keys and values `(rows, groups, columns, size)`; of mask and
// bias what broadcasts to `(rows, heads, tokens, columns)`, with all columns; of what is returned `(rows, tokens, heads,
// size)`. If causal, a token sees no column behind its own number.
Tensor attend_many(const Tensor& query, const Tensor& key, const Tensor& value, const Given& mask, const Given& bias,
                   bool causal, double scale) {
  for (const Tensor* one : {&query, &key, &value})
    STD_TORCH_CHECK(one->scalar_type() == ScalarType::BFloat16 && one->dim() == 4 && one->size(0) == query.size(0),
                    "queries, keys and values are bfloat16, of as many rows");
  STD_TORCH_CHECK(key.size(1) && query.size(1) % key.size(1) == 0 && query.size(3) == key.size(3) &&
                      key.sizes().slice(0, 3) == value.sizes().slice(0, 3), "queries, keys and values do not fit");
  Tensor to = torch::stable::new_empty(query, {query.size(0), query.size(2), query.size(1), value.size(3)});
  const Tensor own[] = {dense(query), dense(key), dense(value)};
  const Given masked = dense(mask, query, query.size(1), key.size(2)), added = dense(bias, query, query.size(1), key.size(2));
  Prompts{own[0], own[1], own[2], Spread(masked), Spread(added), causal, static_cast<float>(scale),
          static_cast<uint16_t*>(to.mutable_data_ptr())}
      .run();
  return to;
}

STABLE_TORCH_LIBRARY_FRAGMENT(LMKIT_OPERATORS, library) {
  library.def(
      "attend_many(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, bool causal, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(LMKIT_OPERATORS, CPU, library) { library.impl("attend_many", TORCH_BOX(&attend_many)); }

}  // namespace

#endif
