#include "moe_common.h"

#include <cmath>

namespace glmcompile {
namespace {

// Scratch memory of one chunk of tokens, and the fewest tokens worth reading all weights for.
constexpr std::int64_t kChunkBytes = 64 << 20;
constexpr std::int64_t kMinChunkTokens = 512;

ExpertActivation parse_activation(const std::string& name) {
  using A = ExpertActivation;
  if (name == "silu") return A::kSilu;
  if (name == "gelu") return A::kGelu;
  if (name == "gelu_tanh") return A::kGeluTanh;
  if (name == "quick_gelu") return A::kQuickGelu;
  if (name == "relu") return A::kRelu;
  if (name == "relu2") return A::kRelu2;
  if (name == "clamped_swiglu") return A::kClampedSwiglu;
  fail("attribute activation: \"", name,
       "\" is none of silu, gelu, gelu_tanh, quick_gelu, relu, relu2, clamped_swiglu");
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

}  // namespace

bool read_flag(const KernelInfo& info, const char* name, bool fallback) {
  const std::int64_t value = info.attribute<std::int64_t>(name, fallback);
  check(value == 0 || value == 1, "attribute ", name, ": expected 0 or 1, got ", value);
  return value == 1;
}

Gating read_gating(const KernelInfo& info) {
  Gating gating{parse_activation(info.required<std::string>("activation")),
                read_flag(info, "gated", true)};
  const bool clamped = gating.activation == ExpertActivation::kClampedSwiglu;
  check(gating.gated || !clamped, "attribute gated: expected 1 with clamped_swiglu, got 0");
  if (clamped) gating.alpha = info.required<float>("alpha");
  check(std::isfinite(gating.alpha), "attribute alpha: expected a finite number, got ",
        gating.alpha);
  const float limit =
      clamped ? info.required<float>("limit") : info.attribute<float>("limit", 0.0f);
  check(std::isfinite(limit) && limit >= 0.0f && (limit > 0.0f || !clamped),
        "attribute limit: expected a finite number ", clamped ? "> 0" : ">= 0", ", got ", limit);
  check(gating.gated || limit == 0.0f, "attribute limit: expected 0 without a gate, got ", limit);
  if (limit > 0.0f) {
    const bool after = read_flag(info, "limit_activated", false);
    (after ? gating.activated_limit : gating.gate_limit) = limit;
    gating.up_limit = limit;
  }
  return gating;
}

void check_shape(const Tensor& tensor, const std::vector<std::int64_t>& expected,
                 const char* meaning) {
  check(tensor.rank() == expected.size() &&
            std::equal(expected.begin(), expected.end(), tensor.shape()),
        tensor.name(), ": expected ", meaning, " = ", shape_text(expected), ", got ",
        tensor.shape_text());
}

RoutedTokens RoutedTokens::slice(std::int64_t begin, std::int64_t count) const {
  return {x + begin * width, expert + begin * choices, weight + begin * choices, count, width,
          choices};
}

RoutedTokens routed_tokens(const Tensor& x, const Tensor& top_k_index, const Tensor& top_k_weights,
                           std::int64_t experts) {
  check(x.rank() == 2, "x: expected [tokens, H], got ", x.shape_text());
  const std::int64_t tokens = x.dim(0);
  check(top_k_index.rank() == 2 && top_k_index.dim(0) == tokens, "top_k_index: expected [", tokens,
        ", k] for x ", x.shape_text(), ", got ", top_k_index.shape_text());
  const std::int64_t choices = top_k_index.dim(1);
  check_shape(top_k_weights, {tokens, choices}, "top_k_index's shape");
  const std::int64_t* expert = top_k_index.data<std::int64_t>();
  for (std::int64_t i = 0; i < tokens * choices; ++i) {
    check(expert[i] >= 0 && expert[i] < experts, "top_k_index[", i / choices, ", ", i % choices,
          "]: expected an expert from 0 to ", experts - 1, ", got ", expert[i]);
  }
  return {x.data<float>(), expert, top_k_weights.data<float>(), tokens, x.dim(1), choices};
}

Routing::Routing(const RoutedTokens& routed, std::int64_t experts)
    : token(static_cast<std::size_t>(routed.rows())), expert(token.size()), row(token.size()) {
  std::vector<std::int64_t> next(static_cast<std::size_t>(experts));
  for (std::int64_t i = 0; i < routed.rows(); ++i) ++next[routed.expert[i]];
  std::int64_t begin = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    const std::int64_t end = begin + next[e];
    if (end > begin) groups.push_back({e, begin, end});
    next[e] = begin;
    begin = end;
  }
  for (std::int64_t i = 0; i < routed.rows(); ++i) {
    row[i] = next[routed.expert[i]]++;
    token[row[i]] = i / routed.choices;
    expert[row[i]] = routed.expert[i];
  }
}

std::int64_t tokens_per_chunk(const RoutedTokens& routed, std::int64_t bytes_per_row) {
  const std::int64_t bytes = std::max<std::int64_t>(bytes_per_row * routed.choices, 1);
  return std::max(kChunkBytes / bytes, kMinChunkTokens);
}

void combine_choices(const KernelContext& context, const MoEKernels& kernels,
                     const RoutedTokens& routed, const Routing& routing, const float* results,
                     std::int64_t stride, std::int64_t width, float* output) {
  std::vector<const float*> rows(routing.row.size());
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = results + routing.row[i] * stride;
  for_each_item(context, routed.tokens, width * routed.choices, [&](std::int64_t token) {
    const std::int64_t first = token * routed.choices;
    kernels.combine(rows.data() + first, routed.weight + first, routed.choices, width,
                    output + token * width);
  });
}

}  // namespace glmcompile
