// com.glmcompile::MoE, the experts of a mixture-of-experts layer in float32.
//
// y = sum over a token's k choices of top_k_weights * expert(x), and expert(x) = down(act(up(x))).
// With `gated` (the default) up gives gate and up, N = 2 I channels: the gates first, or in turns
// with `interleaved`. `transposed`: weights are stored [E, in, out]. For `activation`, `alpha`,
// `limit` and `limit_activated` see Gating in moe_kernels.h.
#pragma once

#include "moe_common.h"

namespace glmcompile {

class MoE {
 public:
  static constexpr const char* kName = "MoE";
  static constexpr const char* kDomain = "com.glmcompile";
  static constexpr Port kInputs[] = {
      {"x", Type::kFloat},                // [tokens, H]
      {"top_k_index", Type::kInt64},      // [tokens, k], 0 to E - 1
      {"top_k_weights", Type::kFloat},    // [tokens, k]
      {"up", Type::kFloat},               // [E, N, H], or [E, H, N] where transposed
      {"down", Type::kFloat},             // [E, H, I], or [E, I, H] where transposed
      {"up_bias", Type::kFloat, true},    // [E, N]
      {"down_bias", Type::kFloat, true},  // [E, H]
  };
  static constexpr Port kOutputs[] = {{"y", Type::kFloat}};  // [tokens, H]

  explicit MoE(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  // All experts' weights of one of the two layers.
  struct Layers;
  Layers up_layers(const KernelContext& context, std::int64_t width) const;
  Layers down_layers(const KernelContext& context, const Layers& up) const;
  void run(const KernelContext& context, const RoutedTokens& routed, const Layers& up,
           const Layers& down, float* output) const;
  void run_up(const float* const* rows, std::int64_t count, const ExpertLayer& layer,
              std::int64_t first, std::int64_t last, float* out, std::int64_t out_stride) const;

  Gating gating_;
  bool interleaved_, transposed_;
  const MoEKernels& kernels_;
};

}  // namespace glmcompile
