// W8A8 linear kernel on AMX int8 tiles, over a policy for the tile registers: the hardware's
// (linear_amx.cc) or an emulation in plain C++ (linear_amx_emulated.cc).
//
// Two by two tiles: 32 rows x 32 channels in accumulators 0 to 3, activations in tiles 4 and 5,
// weights in 6 and 7. A weight block is a sequence of B tiles as it stands in memory.
#pragma once

#include "linear_epilogue.h"
#include "linear_prefetch.h"

namespace glmcompile {

constexpr std::int64_t kAmxTileRows = 32;
constexpr std::int64_t kAmxTileStride = 2 * kBlockN;

// The epilogue of a finished tile, done in slices while the next tile is being multiplied: the
// tile unit and the vector units work side by side.
template <class V>
class PendingTile {
 public:
  explicit PendingTile(const LinearProblem& problem) : problem_(problem) {}

  void set(const std::int32_t* acc, std::int64_t row, std::int64_t rows, std::int64_t block,
           std::int64_t blocks) {
    acc_ = acc;
    row_ = row;
    rows_left_ = rows;
    block_ = block;
    blocks_ = blocks;
  }
  void finish(std::int64_t rows) {
    const std::int64_t now = rows_left_ < rows ? rows_left_ : rows;
    if (now == 0) return;
    finish_tile<V>(problem_, acc_, kAmxTileStride, row_, now, block_, blocks_);
    acc_ += now * kAmxTileStride;
    row_ += now;
    rows_left_ -= now;
  }
  void finish_all() { finish(rows_left_); }

 private:
  const LinearProblem& problem_;
  const std::int32_t* acc_ = nullptr;
  std::int64_t row_ = 0, rows_left_ = 0, block_ = 0, blocks_ = 0;
};

// acc [row_tiles * 16][32] = the product; finishes the pending tile meanwhile.
template <class Tiles, class V, int row_tiles, int blocks>
void multiply_amx(const LinearProblem& p, const std::uint8_t* a, const std::int8_t* w,
                  PendingTile<V>& pending, WeightsAhead& ahead, std::int32_t* acc) {
  Tiles::template zero<0>();
  if constexpr (blocks == 2) Tiles::template zero<1>();
  if constexpr (row_tiles == 2) Tiles::template zero<2>();
  if constexpr (row_tiles == 2 && blocks == 2) Tiles::template zero<3>();
  const std::int64_t lower = 16 * p.row_stride, right = p.block_bytes();
  const std::int64_t slice = ceil_div(kAmxTileRows, p.k_blocks);
  for (std::int64_t kb = 0; kb < p.k_blocks; ++kb, a += kBlockK, w += kBlockK * kBlockN) {
    Tiles::template load<6>(w, 64);
    Tiles::template load<4>(a, p.row_stride);
    Tiles::template multiply<0, 4, 6>();
    if constexpr (blocks == 2) {
      Tiles::template load<7>(w + right, 64);
      Tiles::template multiply<1, 4, 7>();
    }
    if constexpr (row_tiles == 2) {
      Tiles::template load<5>(a + lower, p.row_stride);
      Tiles::template multiply<2, 5, 6>();
    }
    if constexpr (row_tiles == 2 && blocks == 2) Tiles::template multiply<3, 5, 7>();
    for (int i = 0; i < 16 * blocks; ++i) __builtin_prefetch(ahead.at + i * ahead.step, 0, 2);
    ahead.at += WeightsAhead::kPerBlock * ahead.step;
    pending.finish(slice);
  }
  pending.finish_all();
  constexpr std::int64_t bytes = kAmxTileStride * sizeof(std::int32_t);
  Tiles::template store<0>(acc, bytes);
  if constexpr (blocks == 2) Tiles::template store<1>(acc + kBlockN, bytes);
  acc += 16 * kAmxTileStride;
  if constexpr (row_tiles == 2) Tiles::template store<2>(acc, bytes);
  if constexpr (row_tiles == 2 && blocks == 2) Tiles::template store<3>(acc + kBlockN, bytes);
}

template <class Tiles, class V>
void multiply_tiles_amx(const LinearProblem& p, std::int64_t row_begin, std::int64_t row_end,
                        std::int64_t block_begin, std::int64_t block_end) {
  // One buffer is finished while the other is filled.
  alignas(64) std::int32_t acc[2][kAmxTileRows * kAmxTileStride];
  int current = 0;
  PendingTile<V> pending(p);
  Tiles::configure();
  const std::int64_t row_tiles = ceil_div(row_end - row_begin, kAmxTileRows);
  const std::int64_t group = group_blocks(p, row_tiles);
  for (std::int64_t first = block_begin; first < block_end; first += group) {
    const std::int64_t last = first + group < block_end ? first + group : block_end;
    WeightsAhead ahead(p, last, row_tiles);
    for (std::int64_t row = row_begin; row < row_end; row += kAmxTileRows) {
      const std::int64_t rows = row_end - row < kAmxTileRows ? row_end - row : kAmxTileRows;
      const std::uint8_t* a = p.rows + row * p.row_stride;
      for (std::int64_t block = first; block < last; block += 2) {
        const std::int64_t blocks = last - block < 2 ? 1 : 2;
        const std::int8_t* w = p.weight + block * p.block_bytes();
        std::int32_t* to = acc[current];
        EpilogueAhead(p, row, rows, block).all();
        if (rows > 16) {
          blocks == 2 ? multiply_amx<Tiles, V, 2, 2>(p, a, w, pending, ahead, to)
                      : multiply_amx<Tiles, V, 2, 1>(p, a, w, pending, ahead, to);
        } else {
          blocks == 2 ? multiply_amx<Tiles, V, 1, 2>(p, a, w, pending, ahead, to)
                      : multiply_amx<Tiles, V, 1, 1>(p, a, w, pending, ahead, to);
        }
        pending.set(to, row, rows, block, blocks);
        current ^= 1;
      }
    }
  }
  pending.finish_all();
  Tiles::release();
}

}  // namespace glmcompile
