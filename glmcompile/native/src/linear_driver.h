// The loop over register tiles that the linear kernels without AMX share.
#pragma once

#include "linear_epilogue.h"

namespace glmcompile {

// Tile provides kRows (the height of its register tile) and
//   multiply(a, stride, rows, w, block_bytes, blocks, k_blocks, tile):
//     tile [rows][32] int32 = rows of quantized activations times `blocks` (1 or 2) weight blocks.
// Each pair of weight blocks is read once for all rows; V finishes the tile.
template <class V, class Tile>
void multiply_tiles(const LinearProblem& p, std::int64_t row_begin, std::int64_t row_end,
                    std::int64_t block_begin, std::int64_t block_end) {
  alignas(64) std::int32_t tile[Tile::kRows * 2 * kBlockN];
  const std::int64_t row_tiles = ceil_div(row_end - row_begin, Tile::kRows);
  if (row_tiles == 0) return;
  // Tiles of even height: a last tile of one row would waste most of the registers.
  const std::int64_t height = ceil_div(row_end - row_begin, row_tiles);
  for (std::int64_t block = block_begin; block < block_end; block += 2) {
    const std::int64_t blocks = block_end - block < 2 ? 1 : 2;
    const std::int8_t* w = p.weight + block * p.block_bytes();
    for (std::int64_t row = row_begin; row < row_end; row += height) {
      const std::int64_t rows = row_end - row < height ? row_end - row : height;
      Tile::multiply(p.rows + row * p.row_stride, p.row_stride, rows, w, p.block_bytes(), blocks,
                     p.k_blocks, tile);
      finish_tile<V>(p, tile, 2 * kBlockN, row, rows, block, blocks);
    }
  }
}

}  // namespace glmcompile
