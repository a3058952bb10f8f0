// The AMX tile registers, configured as eight tiles of 16 rows x 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace glmcompile {
// Internal linkage: each instruction set's translation unit must keep its own copy.
namespace {

struct TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the layout of LDTILECFG");

// The intrinsics take tile numbers as literal tokens, hence the chains of comparisons.
#define GLMCOMPILE_EACH_TILE(action) \
  do {                               \
    if constexpr (t == 0) action(0); \
    if constexpr (t == 1) action(1); \
    if constexpr (t == 2) action(2); \
    if constexpr (t == 3) action(3); \
    if constexpr (t == 4) action(4); \
    if constexpr (t == 5) action(5); \
    if constexpr (t == 6) action(6); \
    if constexpr (t == 7) action(7); \
  } while (false)

struct HardwareTiles {
  static void configure() {
    static const TileConfig config;
    _tile_loadconfig(&config);
  }
  static void release() { _tile_release(); }

  template <int t>
  static inline void zero() {
    GLMCOMPILE_EACH_TILE(_tile_zero);
  }
  template <int t>
  static inline void load(const void* from, std::int64_t stride) {
#define GLMCOMPILE_LOAD(tile) _tile_loadd(tile, from, stride)
    GLMCOMPILE_EACH_TILE(GLMCOMPILE_LOAD);
#undef GLMCOMPILE_LOAD
  }
  template <int t>
  static inline void store(void* to, std::int64_t stride) {
#define GLMCOMPILE_STORE(tile) _tile_stored(tile, to, stride)
    GLMCOMPILE_EACH_TILE(GLMCOMPILE_STORE);
#undef GLMCOMPILE_STORE
  }
  template <int c, int a, int b>
  static inline void multiply() {
    static_assert(c == 2 * (a - 4) + b - 6, "accumulator of the row and column tile");
    if constexpr (c == 0) _tile_dpbusd(0, 4, 6);
    if constexpr (c == 1) _tile_dpbusd(1, 4, 7);
    if constexpr (c == 2) _tile_dpbusd(2, 5, 6);
    if constexpr (c == 3) _tile_dpbusd(3, 5, 7);
  }
};

#undef GLMCOMPILE_EACH_TILE

}  // namespace
}  // namespace glmcompile
