// W8A8 linear kernel in plain C++, for every CPU.
#include "linear_epilogue.h"
#include "linear_vec_portable.h"
#include "quantize_rows.h"

namespace glmcompile {
namespace {

constexpr std::int64_t kTileRows = 4;

// acc [rows][16] = rows of uint8 times one block of 16 channels.
void multiply_block(const std::uint8_t* a, std::int64_t stride, std::int64_t rows,
                    const std::int8_t* w, std::int64_t k_blocks, std::int32_t* acc) {
  std::memset(acc, 0, static_cast<std::size_t>(rows * kBlockN) * sizeof *acc);
  for (std::int64_t k = 0; k < k_blocks * kBlockK; k += 4, w += 4 * kBlockN) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::uint8_t* q = a + r * stride + k;
      const std::int32_t q0 = q[0], q1 = q[1], q2 = q[2], q3 = q[3];
      std::int32_t* out = acc + r * kBlockN;
      for (int n = 0; n < kBlockN; ++n) {
        out[n] += q0 * w[4 * n] + q1 * w[4 * n + 1] + q2 * w[4 * n + 2] + q3 * w[4 * n + 3];
      }
    }
  }
}

void gemm(const LinearProblem& p, std::int64_t row_begin, std::int64_t row_end,
          std::int64_t block_begin, std::int64_t block_end) {
  alignas(64) std::int32_t acc[2 * kTileRows * kBlockN];
  alignas(64) std::int32_t tile[kTileRows * 2 * kBlockN];
  for (std::int64_t block = block_begin; block < block_end; block += 2) {
    const std::int64_t blocks = block_end - block < 2 ? 1 : 2;
    for (std::int64_t row = row_begin; row < row_end; row += kTileRows) {
      const std::int64_t rows = row_end - row < kTileRows ? row_end - row : kTileRows;
      for (std::int64_t b = 0; b < blocks; ++b) {
        multiply_block(p.rows + row * p.row_stride, p.row_stride, rows,
                       p.weight + (block + b) * p.block_bytes(), p.k_blocks, acc);
        for (std::int64_t r = 0; r < rows; ++r) {
          std::memcpy(tile + r * 2 * kBlockN + b * kBlockN, acc + r * kBlockN,
                      kBlockN * sizeof *acc);
        }
      }
      finish_tile<VecPortable>(p, tile, 2 * kBlockN, row, rows, block, blocks);
    }
  }
}

}  // namespace

const LinearKernel& linear_kernel_portable() {
  static const LinearKernel kernel = {"portable", kTileRows, quantize_row<VecPortable>, gemm};
  return kernel;
}

}  // namespace glmcompile
