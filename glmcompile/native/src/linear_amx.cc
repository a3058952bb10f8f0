// W8A8 linear kernel on the AMX tile registers. Few rows go to the AVX-512 kernel: both give the
// same bits (exact sums, the same epilogue), and a tile of 16 rows would be mostly empty.
#include "amx_tiles.h"
#include "linear_amx_kernel.h"
#include "linear_vec_avx512.h"
#include "quantize_rows.h"

namespace glmcompile {
namespace {

constexpr std::int64_t kMinRows = 5;

void gemm(const LinearProblem& p, std::int64_t row_begin, std::int64_t row_end,
          std::int64_t block_begin, std::int64_t block_end) {
  const bool few = row_end - row_begin < kMinRows;
  const auto run = few ? linear_kernel_avx512().gemm : multiply_tiles_amx<HardwareTiles, VecAvx512>;
  run(p, row_begin, row_end, block_begin, block_end);
}

}  // namespace

const LinearKernel& linear_kernel_amx() {
  static const LinearKernel kernel = {"amx", kAmxTileRows, sizeof(std::uint8_t),
                                      quantize_row<VecAvx512, std::uint8_t>, gemm};
  return kernel;
}

}  // namespace glmcompile
