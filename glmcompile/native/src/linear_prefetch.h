// What the linear kernels prefetch, and how many weights they keep in cache at a time.
#pragma once

#include "linear_problem.h"

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

  WeightsAhead(const LinearProblem& p, std::int64_t block, std::int64_t row_tiles)
      : at(p.weight + block * p.block_bytes()),
        step(ceil_div(2 * kBlockN * kBlockK / kPerBlock, row_tiles)) {}
};

// Weight blocks of one pass over the rows. With few rows the weights are only passing by, and a
// small group keeps the prefetch near.
inline std::int64_t group_blocks(const LinearProblem& p, std::int64_t row_tiles) {
  const std::int64_t most = kGroupBytes / p.block_bytes() / 2 * 2;
  return row_tiles > 2 && most > 2 ? most : 2;
}

// Claims the cache lines of a tile's outputs, and fetches its residuals, while it is multiplied: a
// few rows with every block of k, since a burst would take every fill buffer from the weights.
struct EpilogueAhead {
  const float* output;
  const float* residual;  // or null
  std::int64_t width, rows, rows_at_a_time;
  std::int64_t line;  // distance to a row's second cache line; 0 where there is one

  EpilogueAhead(const LinearProblem& p, std::int64_t row, std::int64_t rows, std::int64_t block)
      : width(p.output_width), rows(rows), rows_at_a_time(ceil_div(rows, p.k_blocks)) {
    const bool halved = p.activation == Activation::kSwiglu;
    const std::int64_t first = row * width + block * (halved ? kBlockN / 2 : kBlockN);
    line = halved ? 0 : kBlockN;
    output = p.output + first;
    residual = p.residual ? p.residual + first : nullptr;
  }

  void step() {
    for (std::int64_t i = 0; i < rows_at_a_time && rows > 0; ++i, --rows) {
      prefetch_write(output);
      prefetch_write(output + line);
      output += width;
      if (residual) {
        __builtin_prefetch(residual);
        __builtin_prefetch(residual + line);
        residual += width;
      }
    }
  }

  void all() {
    while (rows > 0) step();
  }
};

}  // namespace

}  // namespace glmcompile
