// What the mixture-of-experts operators compute in float32: products with one expert's weights,
// the activation between its two layers, the weighted sum of the chosen experts. One table of
// functions for each instruction set.
//
// Every number is computed by the same operations in the same order whatever the other rows,
// channels and threads of the call, so that a token's result does not depend on its batch.
#pragma once

#include <cstdint>
#include <limits>

namespace glmcompile {

// One expert's layer of [N, K], or [K, N] where transposed, N its channels.
struct ExpertLayer {
  const float* weight;
  const float* bias;  // [N] or null
  std::int64_t in_features;
  std::int64_t out_features;
  bool transposed;
};

enum class ExpertActivation { kSilu, kGelu, kGeluTanh, kQuickGelu, kRelu, kRelu2, kClampedSwiglu };

// y = act(gate) * up, and act(x) where there is no gate; with limits
//     y = min(act(min(gate, gate_limit)), activated_limit) * clamp(up, -up_limit, up_limit).
// kClampedSwiglu is y = gate * sigmoid(alpha * gate) * (up + 1), under the same limits.
struct Gating {
  static constexpr float kNone = std::numeric_limits<float>::infinity();

  ExpertActivation activation;
  bool gated;
  float alpha = 1.0f;
  float gate_limit = kNone, activated_limit = kNone, up_limit = kNone;
};

// Vectors have this many lanes; buffers of the functions below are padded to it where they say so.
constexpr std::int64_t kMoELanes = 16;
// Few rows only wait for the weights, which are then read in the longest runs there are.
constexpr std::int64_t kMoEFewRows = 4;

struct MoEKernels {
  // out [count, last - first] = channels [first, last) of the layer for rows of in_features
  // floats. out's rows are out_stride floats apart and padded to whole vectors.
  void (*multiply)(const float* const* rows, std::int64_t count, const ExpertLayer& layer,
                   std::int64_t first, std::int64_t last, float* out, std::int64_t out_stride);
  // out [n] from gate and up, whose n elements are `step` floats apart; up is null without a gate.
  void (*activate)(const Gating& gating, const float* gate, const float* up, std::int64_t step,
                   std::int64_t n, float* out);
  // out [n] = sum over i of weights[i] * rows[i], zero for none.
  void (*combine)(const float* const* rows, const float* weights, std::int64_t count,
                  std::int64_t n, float* out);
};

const MoEKernels& moe_kernels_portable();
#if defined(__x86_64__)
const MoEKernels& moe_kernels_avx2();
const MoEKernels& moe_kernels_avx512();
#endif

// The fastest table this CPU runs, capped by the environment variable GLMCOMPILE_ISA. Throws Error
// for an unknown value of the variable.
const MoEKernels& select_moe_kernels();

}  // namespace glmcompile
