// com.glmcompile::MoEW8A8, the experts of a mixture-of-experts layer with int8 weights.
//
// Each expert's two layers are LinearW8A8's: weights packed the same way, gate and up channels in
// alternating blocks of 16, activations quantized per row inside, multiplied by the expert's input
// scale first where there is one. Attributes are MoE's but `interleaved` and `transposed`.
#pragma once

#include "linear_problem.h"
#include "moe_common.h"

namespace glmcompile {

class MoEW8A8 {
 public:
  static constexpr const char* kName = "MoEW8A8";
  static constexpr const char* kDomain = "com.glmcompile";
  static constexpr Port kInputs[] = {
      {"x", Type::kFloat},                       // [tokens, H]
      {"top_k_index", Type::kInt64},             // [tokens, k], 0 to E - 1
      {"top_k_weights", Type::kFloat},           // [tokens, k]
      {"up", Type::kInt8},                       // [E, N16, H64, 16 k4, 16 n, 4 k]
      {"up_scale", Type::kFloat},                // [E, N]
      {"up_sum", Type::kInt32},                  // [E, N]
      {"down", Type::kInt8},                     // [E, H16, I64, 16 k4, 16 n, 4 k]
      {"down_scale", Type::kFloat},              // [E, H]
      {"down_sum", Type::kInt32},                // [E, H]
      {"up_bias", Type::kFloat, true},           // [E, N]
      {"down_bias", Type::kFloat, true},         // [E, H]
      {"up_input_scale", Type::kFloat, true},    // [E, H]
      {"down_input_scale", Type::kFloat, true},  // [E, I]
  };
  static constexpr Port kOutputs[] = {{"y", Type::kFloat}};  // [tokens, H]

  explicit MoEW8A8(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  // All experts' weights of one of the two layers.
  struct Layers;
  // Rows of activations as the linear kernels take them.
  struct Quantized;

  Layers layers(const KernelContext& context, std::size_t weight, std::int64_t experts,
                std::int64_t in_features, std::int64_t out_features) const;
  void run(const KernelContext& context, const RoutedTokens& routed, const Layers& up,
           const Layers& down, float* output) const;
  void multiply(const KernelContext& context, const Routing& routing, const Layers& layers,
                const Quantized& rows, float* output) const;
  const float* activate(const float* raw, std::int64_t inner) const;

  Gating gating_;
  bool fused_;  // the linear kernels apply the activation themselves
  const LinearKernel& linear_;
  const MoEKernels& kernels_;
};

}  // namespace glmcompile
