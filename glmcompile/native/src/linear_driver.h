// The loop over register tiles that the linear kernels without AMX share.
#pragma once

#include "linear_epilogue.h"
#include "linear_prefetch.h"

namespace glmcompile {

// Tile provides kRows (the height of its register tile) and
//   multiply(a, stride, rows, w, block_bytes, blocks, k_blocks, ahead, epilogue, tile):
//     tile [rows][32] int32 = rows of quantized activations times `blocks` (1 or 2) weight blocks;
// it may prefetch what both say lies ahead. V finishes the tile.
template <class V, class Tile>
void multiply_tiles(const LinearProblem& p, std::int64_t row_begin, std::int64_t row_end,
                    std::int64_t block_begin, std::int64_t block_end) {
  alignas(64) std::int32_t tile[Tile::kRows * 2 * kBlockN];
  const std::int64_t row_tiles = ceil_div(row_end - row_begin, Tile::kRows);
  if (row_tiles == 0) return;
  // Tiles of even height: a last tile of one row would waste most of the registers.
  const std::int64_t height = ceil_div(row_end - row_begin, row_tiles);
  const std::int64_t group = group_blocks(p, row_tiles);
  // Rows outside, blocks inside: a row's outputs are written side by side.
  for (std::int64_t first = block_begin; first < block_end; first += group) {
    const std::int64_t last = first + group < block_end ? first + group : block_end;
    WeightsAhead ahead(p, last, row_tiles);
    for (std::int64_t row = row_begin; row < row_end; row += height) {
      const std::int64_t rows = row_end - row < height ? row_end - row : height;
      const std::uint8_t* a = p.rows + row * p.row_stride;
      for (std::int64_t block = first; block < last; block += 2) {
        const std::int64_t blocks = last - block < 2 ? 1 : 2;
        EpilogueAhead epilogue(p, row, rows, block);
        Tile::multiply(a, p.row_stride, rows, p.weight + block * p.block_bytes(), p.block_bytes(),
                       blocks, p.k_blocks, ahead, epilogue, tile);
        finish_tile<V>(p, tile, 2 * kBlockN, row, rows, block, blocks);
      }
    }
  }
}

}  // namespace glmcompile
