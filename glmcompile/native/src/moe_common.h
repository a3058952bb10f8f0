// What the mixture-of-experts operators share: attributes, checks, tokens grouped by expert, the
// weighted sum at the end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "moe_kernels.h"
#include "ort_abi.h"

namespace glmcompile {

// Reads an attribute that is 0 or 1.
bool read_flag(const KernelInfo& info, const char* name, bool fallback);

// Reads the attributes `activation`, `gated`, `alpha`, `limit` and `limit_activated`.
Gating read_gating(const KernelInfo& info);

// Throws Error unless the tensor has this shape; `meaning` says what its dimensions are.
void check_shape(const Tensor& tensor, const std::vector<std::int64_t>& expected,
                 const char* meaning);

// The activations and what the router chose for them.
struct RoutedTokens {
  const float* x;              // [tokens, width]
  const std::int64_t* expert;  // [tokens, choices]
  const float* weight;         // [tokens, choices]
  std::int64_t tokens, width, choices;

  std::int64_t rows() const { return tokens * choices; }
  // Tokens [begin, begin + count), as a batch of their own.
  RoutedTokens slice(std::int64_t begin, std::int64_t count) const;
};

// Checks the first three inputs of either operator; every expert lies in [0, experts).
RoutedTokens routed_tokens(const Tensor& x, const Tensor& top_k_index, const Tensor& top_k_weights,
                           std::int64_t experts);

// A row is one choice of one token; rows are sorted by expert, and by token within one.
struct Routing {
  struct Group {
    std::int64_t expert, begin, end;  // rows [begin, end), at least one
    std::int64_t rows() const { return end - begin; }
  };

  Routing(const RoutedTokens& routed, std::int64_t experts);

  std::vector<Group> groups;
  std::vector<std::int64_t> token;  // [rows]
  std::vector<std::int64_t> row;    // [tokens * choices], where a choice went
};

// Tokens to process at a time where a row needs so much scratch memory: weights are read again for
// every such chunk, which is long enough for that not to matter.
std::int64_t tokens_per_chunk(const RoutedTokens& routed, std::int64_t bytes_per_row);

// output [tokens, width] = the sums of the rows `results`, `stride` floats apart, by their weights.
void combine_choices(const KernelContext& context, const MoEKernels& kernels,
                     const RoutedTokens& routed, const Routing& routing, const float* results,
                     std::int64_t stride, std::int64_t width, float* output);

// Runs body(group, task) for every group and every task of it, over the session's threads.
// tasks[group].count() says how many a group has.
template <class Tasks, class Body>
void for_each_task(const KernelContext& context, const std::vector<Tasks>& tasks,
                   const Body& body) {
  std::vector<std::int64_t> ends;
  std::int64_t total = 0;
  for (const Tasks& group : tasks) ends.push_back(total += group.count());
  context.parallel_for(static_cast<std::size_t>(total), [&](std::size_t index) {
    const auto task = static_cast<std::int64_t>(index);
    const auto group = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const std::int64_t begin = group > 0 ? ends[static_cast<std::size_t>(group) - 1] : 0;
    body(static_cast<std::size_t>(group), task - begin);
  });
}

// Runs body(item) for 0 <= item < count in tasks of about kSmallTaskElements elements each.
constexpr std::int64_t kSmallTaskElements = 8 << 10;
template <class Body>
void for_each_item(const KernelContext& context, std::int64_t count, std::int64_t elements,
                   const Body& body) {
  const std::int64_t group =
      std::max<std::int64_t>(kSmallTaskElements / std::max<std::int64_t>(elements, 1), 1);
  const std::int64_t tasks = (count + group - 1) / group;
  context.parallel_for(static_cast<std::size_t>(tasks), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * group;
    for (std::int64_t item = first; item < std::min(first + group, count); ++item) body(item);
  });
}

}  // namespace glmcompile
