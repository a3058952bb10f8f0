// The AMX linear kernel on emulated tile registers: tests of its logic on processors without AMX.
#include <cstdlib>

#include "linear_amx_kernel.h"
#include "linear_vec_portable.h"
#include "quantize_rows.h"

namespace glmcompile {
namespace {

struct TileRegisters {
  bool configured = false;
  alignas(64) std::uint8_t bytes[8][16][64];
};

thread_local TileRegisters registers;

// As the instructions: using tiles without a configuration is a fault.
struct EmulatedTiles {
  static void configure() {
    registers.configured = true;
    std::memset(registers.bytes, 0, sizeof registers.bytes);
  }
  static void release() { registers.configured = false; }
  static void require_configuration() {
    if (!registers.configured) std::abort();
  }

  template <int t>
  static void zero() {
    require_configuration();
    std::memset(registers.bytes[t], 0, sizeof registers.bytes[t]);
  }
  template <int t>
  static void load(const void* from, std::int64_t stride) {
    require_configuration();
    for (std::int64_t r = 0; r < 16; ++r) {
      std::memcpy(registers.bytes[t][r], static_cast<const std::uint8_t*>(from) + r * stride, 64);
    }
  }
  template <int t>
  static void store(void* to, std::int64_t stride) {
    require_configuration();
    for (std::int64_t r = 0; r < 16; ++r) {
      std::memcpy(static_cast<std::uint8_t*>(to) + r * stride, registers.bytes[t][r], 64);
    }
  }
  // TDPBUSD: c[m][n] += sum over k of uint8 a[m][k] * int8 b[k / 4][4 n + k % 4].
  template <int c, int a, int b>
  static void multiply() {
    require_configuration();
    for (int m = 0; m < 16; ++m) {
      std::int32_t sums[16];
      std::memcpy(sums, registers.bytes[c][m], sizeof sums);
      for (int k = 0; k < 64; ++k) {
        const std::int32_t q = registers.bytes[a][m][k];
        for (int n = 0; n < 16; ++n) {
          sums[n] += q * static_cast<std::int8_t>(registers.bytes[b][k / 4][4 * n + k % 4]);
        }
      }
      std::memcpy(registers.bytes[c][m], sums, sizeof sums);
    }
  }
};

}  // namespace

const LinearKernel& linear_kernel_amx_emulated() {
  static const LinearKernel kernel = {"amx_emulated", kAmxTileRows, sizeof(std::uint8_t),
                                      quantize_row<VecPortable, std::uint8_t>,
                                      multiply_tiles_amx<EmulatedTiles, VecPortable>};
  return kernel;
}

}  // namespace glmcompile
