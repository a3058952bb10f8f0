// How the rows and channels of a W8A8 linear problem are cut into tasks of even size.
#pragma once

#include <algorithm>

#include "linear_problem.h"

namespace glmcompile {

// Below this many rows the weights' bandwidth decides: tasks split N only.
constexpr std::int64_t kStreamingRows = 16;
constexpr std::int64_t kStreamingTaskBytes = 64 << 10;
// Activations of one task, to stay in the L2 cache while its weights pass by.
constexpr std::int64_t kTaskRowBytes = 1 << 20;
// Rows of one task, where its weights come from memory and where they stay in the L2 cache. Every
// task reads its weights again; but with fewer rows it is wider, and its outputs lie side by side.
constexpr std::int64_t kTaskRows = 128;
constexpr std::int64_t kTaskRowsCached = 256;
constexpr std::int64_t kCachedWeightBytes = 2 << 20;
// Multiply-accumulates of one task: some microseconds, long against the cost of taking a task and
// short enough that no thread waits for long at the end.
constexpr std::int64_t kTaskWork = 2 << 20;

class LinearTasks {
 public:
  LinearTasks(const LinearKernel& kernel, const LinearProblem& problem, std::int64_t rows)
      : kernel_(kernel),
        problem_(problem),
        rows_(rows),
        blocks_(ceil_div(problem.out_features, kBlockN)),
        task_rows_(rows) {
    std::int64_t row_tasks = 1;
    if (rows < kStreamingRows) {
      task_blocks_ = kStreamingTaskBytes / problem.block_bytes();
    } else {
      const std::int64_t target = blocks_ * problem.block_bytes() <= kCachedWeightBytes
                                      ? std::max(kTaskRowsCached, 4 * kernel.tile_rows)
                                      : kTaskRows;
      const std::int64_t most =
          std::clamp<std::int64_t>(kTaskRowBytes / problem.row_stride, kMaxTileRows, target);
      row_tasks = ceil_div(rows, most);
      task_rows_ = ceil_div(ceil_div(rows, row_tasks), kernel.tile_rows) * kernel.tile_rows;
      row_tasks = ceil_div(rows, task_rows_);
      task_blocks_ = kTaskWork / (problem.block_bytes() * std::min(task_rows_, rows));
    }
    // Even, so that a swiglu pair and a register tile stay together.
    task_blocks_ = std::max<std::int64_t>(task_blocks_ / 2 * 2, 2);
    column_tasks_ = ceil_div(blocks_, task_blocks_);
    count_ = row_tasks * column_tasks_;
  }

  std::int64_t count() const { return count_; }

  // Tasks may run concurrently.
  void run(std::int64_t task) const {
    const std::int64_t row = task / column_tasks_ * task_rows_;
    const std::int64_t block = task % column_tasks_ * task_blocks_;
    kernel_.gemm(problem_, row, std::min(row + task_rows_, rows_), block,
                 std::min(block + task_blocks_, blocks_));
  }

 private:
  const LinearKernel& kernel_;
  LinearProblem problem_;
  std::int64_t rows_, blocks_;
  std::int64_t task_rows_, task_blocks_;
  std::int64_t column_tasks_, count_;
};

}  // namespace glmcompile
