// W8A8 linear kernel in plain C++, for every CPU.
#include "linear_driver.h"
#include "linear_vec_portable.h"
#include "quantize_rows.h"

namespace glmcompile {
namespace {

struct TilePortable {
  static constexpr std::int64_t kRows = 4;

  static void multiply(const std::uint8_t* a, std::int64_t stride, std::int64_t rows,
                       const std::int8_t* w, std::int64_t block_bytes, std::int64_t blocks,
                       std::int64_t k_blocks, WeightsAhead&, EpilogueAhead& epilogue,
                       std::int32_t* tile) {
    epilogue.all();
    for (std::int64_t b = 0; b < blocks; ++b, w += block_bytes) {
      std::int32_t acc[kRows][kBlockN] = {};
      const std::int8_t* from = w;
      for (std::int64_t k = 0; k < k_blocks * kBlockK; k += 4, from += 4 * kBlockN) {
        for (std::int64_t r = 0; r < rows; ++r) {
          const std::uint8_t* q = a + r * stride + k;
          const std::int32_t q0 = q[0], q1 = q[1], q2 = q[2], q3 = q[3];
          for (int n = 0; n < kBlockN; ++n) {
            acc[r][n] += q0 * from[4 * n] + q1 * from[4 * n + 1] + q2 * from[4 * n + 2] +
                         q3 * from[4 * n + 3];
          }
        }
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        std::memcpy(tile + (2 * r + b) * kBlockN, acc[r], sizeof acc[r]);
      }
    }
  }
};

}  // namespace

const LinearKernel& linear_kernel_portable() {
  static const LinearKernel kernel = {"portable", TilePortable::kRows, sizeof(std::uint8_t),
                                      quantize_row<VecPortable, std::uint8_t>,
                                      multiply_tiles<VecPortable, TilePortable>};
  return kernel;
}

}  // namespace glmcompile
