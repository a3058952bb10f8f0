// com.glmcompile::LinearW8A8, a linear layer with int8 weights and uint8 activations.
//
// y = activation((acc - zero_point * weight_sum) * (row_scale * weight_scale) + bias) + residual,
// acc = sum over k of q(x * input_scale) * w in int32. x is quantized inside, per row (dynamic) or
// with a static scale and zero point; input_scale is SmoothQuant's 1 / s. With the attribute
// rms_epsilon > 0 each row of x is first multiplied by 1 / sqrt(mean(x^2) + rms_epsilon), and
// input_scale holds the weight of that RMSNormalization as well.
#pragma once

#include "linear_problem.h"
#include "ort_abi.h"

namespace glmcompile {

class LinearW8A8 {
 public:
  static constexpr const char* kName = "LinearW8A8";
  static constexpr const char* kDomain = "com.glmcompile";
  static constexpr Port kInputs[] = {
      {"x", Type::kFloat},                 // [..., K]
      {"weight", Type::kInt8},             // [N16, K64, 16 k4, 16 n, 4 k]
      {"weight_scale", Type::kFloat},      // [N]
      {"weight_sum", Type::kInt32},        // [N]
      {"bias", Type::kFloat, true},        // [N]
      {"residual", Type::kFloat, true},    // [..., N], or [..., N / 2] with swiglu
      {"input_scale", Type::kFloat, true},  // [K]
  };
  static constexpr Port kOutputs[] = {{"y", Type::kFloat}};

  explicit LinearW8A8(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  struct Parameters {
    Tensor weight, weight_scale, weight_sum, bias, input_scale;
  };
  void check_parameters(const Parameters& parameters) const;
  void check_vectors(const Tensor& bias, const Tensor& input_scale) const;  // or absent

  std::int64_t in_features_;
  std::int64_t out_features_;
  Activation activation_;
  StaticRange range_;
  float rms_epsilon_;
  const LinearKernel& kernel_;
  // Set, and checked once, when the weight, its scale and its sum are initializers, as they should
  // be: describing a tensor through the C API costs as much as multiplying a small one.
  Parameters constants_;
};

// Throws Error unless `weight` has the packed shape of an [out_features, in_features] matrix.
void check_packed_weight(const Tensor& weight, std::int64_t out_features,
                         std::int64_t in_features);

}  // namespace glmcompile
