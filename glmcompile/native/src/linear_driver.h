// The loop over register tiles that the linear kernels without AMX share.
#pragma once

#include "linear_epilogue.h"

namespace glmcompile {
// Internal linkage: each instruction set's translation unit must keep its own copy.
namespace {

// Weights of one pass over the rows: they stay in the L2 cache beside the activations.
constexpr std::int64_t kGroupBytes = 256 << 10;

// __builtin_prefetch asks for a line to write only with a compiler flag of its own.
inline void prefetch_write(const void* at) {
#if defined(__x86_64__)
  __asm__ volatile("prefetchw %0" ::"m"(*static_cast<const char*>(at)));
#else
  __builtin_prefetch(at, 1);
#endif
}

// Weights to prefetch while others are multiplied: the group after this one, spread evenly over
// the work, so that no pass over the rows waits for memory. Runs beyond the last weight into
// whatever follows, which is harmless: prefetches do not fault.
struct WeightsAhead {
  static constexpr std::int64_t kPerBlock = 32;  // prefetches per block of 64 k

  const std::int8_t* at;
  std::int64_t step;  // bytes from one prefetch to the next; below 64, some repeat a line
};

// Claims the cache lines of a tile's outputs, and fetches its residuals, while it is multiplied.
inline void prefetch_epilogue(const LinearProblem& p, std::int64_t row, std::int64_t rows,
                             std::int64_t block) {
  const bool halved = p.activation == Activation::kSwiglu;
  const std::int64_t first = row * p.output_width + block * (halved ? kBlockN / 2 : kBlockN);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t at = first + r * p.output_width;
    prefetch_write(p.output + at);
    if (!halved) prefetch_write(p.output + at + kBlockN);
    if (p.residual) {
      __builtin_prefetch(p.residual + at);
      if (!halved) __builtin_prefetch(p.residual + at + kBlockN);
    }
  }
}

}  // namespace

// Tile provides kRows (the height of its register tile) and
//   multiply(a, stride, rows, w, block_bytes, blocks, k_blocks, ahead, tile):
//     tile [rows][32] int32 = rows of quantized activations times `blocks` (1 or 2) weight blocks;
// it may prefetch what lies ahead. V finishes the tile.
template <class V, class Tile>
void multiply_tiles(const LinearProblem& p, std::int64_t row_begin, std::int64_t row_end,
                    std::int64_t block_begin, std::int64_t block_end) {
  alignas(64) std::int32_t tile[Tile::kRows * 2 * kBlockN];
  const std::int64_t row_tiles = ceil_div(row_end - row_begin, Tile::kRows);
  if (row_tiles == 0) return;
  // Tiles of even height: a last tile of one row would waste most of the registers.
  const std::int64_t height = ceil_div(row_end - row_begin, row_tiles);
  // Rows outside, blocks inside: a row's outputs are written side by side. With few rows the
  // weights are only passing by, and a small group keeps the prefetch near.
  std::int64_t group = 2;
  if (row_tiles > 2 && kGroupBytes / p.block_bytes() > 2) {
    group = kGroupBytes / p.block_bytes() / 2 * 2;
  }
  const std::int64_t step = ceil_div(2 * kBlockN * kBlockK / WeightsAhead::kPerBlock, row_tiles);
  for (std::int64_t first = block_begin; first < block_end; first += group) {
    const std::int64_t last = first + group < block_end ? first + group : block_end;
    WeightsAhead ahead{p.weight + last * p.block_bytes(), step};
    for (std::int64_t row = row_begin; row < row_end; row += height) {
      const std::int64_t rows = row_end - row < height ? row_end - row : height;
      const std::uint8_t* a = p.rows + row * p.row_stride;
      for (std::int64_t block = first; block < last; block += 2) {
        const std::int64_t blocks = last - block < 2 ? 1 : 2;
        prefetch_epilogue(p, row, rows, block);
        Tile::multiply(a, p.row_stride, rows, p.weight + block * p.block_bytes(), p.block_bytes(),
                       blocks, p.k_blocks, ahead, tile);
        finish_tile<V>(p, tile, 2 * kBlockN, row, rows, block, blocks);
      }
    }
  }
}

}  // namespace glmcompile
