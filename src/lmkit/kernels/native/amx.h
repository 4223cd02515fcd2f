// Products by tiles of AMX, which have 16 rows of 64 bytes; and what they multiply: rows in the order of tiles, and
// weights in blocks of 32 outputs. Of each step's 64 bytes of a row a block has 16 lines of 128 bytes, output by output.
#pragma once

#if defined(__AMX_TILE__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>

namespace lmkit {

constexpr int64_t TILE = 16, LINE = 64;
constexpr int64_t OUTPUTS = 2 * TILE, STEP_BYTES = OUTPUTS * LINE;  // of a block
constexpr int64_t ROWS_CACHED = 3 << 17;  // bytes of rows that stay in a core's cache beside a block
constexpr int64_t WORTH_A_THREAD = 1 << 17;  // multiplications

// Ask the system for tiles, once; where it refuses, vectors compute.
inline bool has_tiles() {
  constexpr long REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
  return granted;
}

// Tell gcc that memory is read, of which it does not know when tiles or what they are told are loaded.
inline void all_is_written(const void* from = nullptr) { __asm__ volatile("" ::"r"(from) : "memory"); }

// This thread's tiles, for as long as it lives; 0 to 5 have so many rows.
struct Tiles {
  explicit Tiles(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } told;
    for (int tile = 0; tile < 8; ++tile) {
      told.bytes[tile] = 64;
      told.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : TILE);
    }
    all_is_written(&told);
    _tile_loadconfig(&told);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Rows in the order of tiles: so many that are multiplied together, in one plane or two of `each` lines; of each step
// first one plane, and then the other. Of a row of whole numbers a plane has one digit, of others a plane has half of
// the rows. Where rows do not fill the last step, it is read `again` of them further ahead, against zeros.
struct Planes {
  int64_t planes, each, steps, again;
  std::unique_ptr<char[]> held;
  char* lines;

  Planes(int64_t groups, int64_t planes, int64_t each, int64_t steps, int64_t again)
      : planes(planes), each(each), steps(steps), again(again), held(new char[groups * bytes() + LINE]),
        lines(held.get() + (LINE - reinterpret_cast<uintptr_t>(held.get()) % LINE)) {}
  int64_t bytes() const { return steps * planes * each * LINE; }  // of what is multiplied together
  char* at(int64_t group, int64_t step, int64_t plane, int64_t line) const {
    return lines + group * bytes() + ((step * planes + plane) * each + line) * LINE;
  }
};

inline void fetch(const uint8_t* from, int64_t lines) {
  for (int64_t line = 0; line < lines; ++line)
    _mm_prefetch(reinterpret_cast<const char*>(from + line * LINE), _MM_HINT_T1);
}

// Multiply a group of rows with a block: whole numbers, or bfloat16. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7
// weights. `to` gets the sums of each plane's lines, of 4 bytes each.
template <bool WHOLE, int64_t PLANES>
void multiply_by_tiles(const uint8_t* weight, const Planes& rows, int64_t group, void* to, const uint8_t* ahead,
                       int64_t lines) {
  all_is_written();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < rows.steps; ++step, ahead += lines * LINE) {
    fetch(ahead, lines);
    const uint8_t* from = weight + step * STEP_BYTES - (step == rows.steps - 1 ? rows.again * OUTPUTS : 0);
    _tile_loadd(4, rows.at(group, step, 0, 0), LINE);
    _tile_loadd(6, from, 2 * LINE);
    _tile_loadd(7, from + LINE, 2 * LINE);
    if constexpr (PLANES == 2) _tile_loadd(5, rows.at(group, step, 1, 0), LINE);
    if constexpr (WHOLE) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if constexpr (PLANES == 2) {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (PLANES == 2) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  auto* sums = static_cast<char*>(to);
  _tile_stored(0, sums, 2 * LINE);
  _tile_stored(1, sums + LINE, 2 * LINE);
  if constexpr (PLANES == 2) {
    _tile_stored(2, sums + rows.each * 2 * LINE, 2 * LINE);
    _tile_stored(3, sums + rows.each * 2 * LINE + LINE, 2 * LINE);
  }
}

// A block as it lies.
inline const uint8_t* as_it_lies(const uint8_t* block, int64_t, uint8_t*) { return block; }

// Go through all groups of rows and all blocks of a weight, of `size` bytes each, on all threads: `open` a block, where
// that needs `room`, of so many bytes; `multiply` each group with it, while the next one is fetched; and `finish` with
// the sums.
template <typename Open, typename Multiply, typename Finish>
void for_blocks(const uint8_t* weight, int64_t size, int64_t blocks, const Planes& rows, int64_t groups, bool tiled,
                int64_t room, Open open, Multiply multiply, Finish finish) {
  const int64_t most = std::max<int64_t>(1, ROWS_CACHED / rows.bytes()), chunks = (groups + most - 1) / most;
  const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / (size * std::min(groups, most) * rows.each));
  torch::stable::parallel_for(0, chunks * blocks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) int32_t sums[2 * TILE * OUTPUTS];
    std::optional<Tiles> tiles;
    if (tiled) tiles.emplace(rows.each);
    const std::unique_ptr<uint8_t[]> held(new uint8_t[room + LINE]);
    uint8_t* opened = held.get() + (LINE - reinterpret_cast<uintptr_t>(held.get()) % LINE);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t number = task % blocks, first = task / blocks * most, count = std::min(most, groups - first);
      const uint8_t* from = weight + number * size;
      const uint8_t* block = open(from, number, opened);
      const int64_t lines = number + 1 < blocks ? (size / LINE / rows.steps + count - 1) / count : 0;
      for (int64_t group = first; group < first + count; ++group) {
        const uint8_t* ahead = from + size + (group - first) * lines * rows.steps * LINE;
        multiply(block, group, sums, ahead, ahead + lines * rows.steps * LINE <= from + 2 * size ? lines : 0);
        finish(sums, group, number * OUTPUTS);
      }
    }
  });
}

}  // namespace lmkit

#endif
