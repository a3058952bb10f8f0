#include "embedding_bag.h"

#include <algorithm>

namespace glmcompile {
namespace {

constexpr std::int64_t kTaskProducts = 64 << 10;
constexpr std::int64_t kColumns = 16;  // as many sums stay in registers

void sum_rows(const float* table, std::int64_t width, const std::int64_t* indices,
              const float* weights, std::int64_t size, float* __restrict y) {
  std::int64_t column = 0;
  for (; column + kColumns <= width; column += kColumns) {
    float sums[kColumns] = {};
    for (std::int64_t i = 0; i < size; ++i) {
      const float* row = table + indices[i] * width + column;
      for (std::int64_t c = 0; c < kColumns; ++c) sums[c] += weights[i] * row[c];
    }
    std::copy(sums, sums + kColumns, y + column);
  }
  for (; column < width; ++column) {
    float sum = 0;
    for (std::int64_t i = 0; i < size; ++i) sum += weights[i] * table[indices[i] * width + column];
    y[column] = sum;
  }
}

}  // namespace

void EmbeddingBag::compute(KernelContext& context) const {
  const Tensor table = context.input(0), indices = context.input(1), weights = context.input(2);
  check(table.rank() == 2, "table: expected [rows, width], got ", table.shape_text());
  check(indices.rank() == 2, "indices: expected [bags, size], got ", indices.shape_text());
  const std::int64_t rows = table.dim(0), width = table.dim(1);
  const std::int64_t bags = indices.dim(0), size = indices.dim(1);
  check(weights.rank() == 2 && weights.dim(0) == bags && weights.dim(1) == size,
        "weights: expected ", indices.shape_text(), " as indices, got ", weights.shape_text());
  const std::int64_t* index = indices.data<std::int64_t>();
  for (std::int64_t i = 0; i < bags * size; ++i) {
    check(index[i] >= 0 && index[i] < rows, "indices: expected 0 to ", rows - 1, ", got ", index[i],
          " at position ", i);
  }
  const std::int64_t shape[] = {bags, width};
  float* y = context.output(0, shape, 2).data<float>();
  const float *from = table.data<float>(), *weight = weights.data<float>();
  const std::int64_t group =
      std::max<std::int64_t>(kTaskProducts / std::max<std::int64_t>(width * size, 1), 1);
  context.parallel_for(static_cast<std::size_t>((bags + group - 1) / group), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * group;
    for (std::int64_t bag = first; bag < std::min(first + group, bags); ++bag) {
      sum_rows(from, width, index + bag * size, weight + bag * size, size, y + bag * width);
    }
  });
}

}  // namespace glmcompile
