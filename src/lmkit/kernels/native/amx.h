// Tiles of AMX: of 16 rows of 64 bytes. Tiles 0 to 5 can have fewer rows.
#pragma once

#if defined(__AMX_TILE__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace lmkit {

constexpr int64_t TILE = 16;

// Ask the system for tiles, once; where it refuses, vectors compute.
inline bool has_tiles() {
  constexpr long REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
  return granted;
}

// This thread's tiles, for as long as it lives.
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
    __asm__ volatile("" ::"r"(&told) : "memory");  // gcc takes the instruction to read eight bytes of it
    _tile_loadconfig(&told);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

}  // namespace lmkit

#endif
