// The table of recurrent kernels over a vector type, for the translation unit of its instructions.
#pragma once

#include "causal_conv_kernel.h"
#include "gated_delta_kernel.h"
#include "mamba_kernel.h"

namespace glmcompile {
namespace {

// kVectors: of a state's columns whose sums fit the registers side by side.
template <class V, int kVectors>
const RecurrentKernels& recurrent_table() {
  static constexpr RecurrentKernels table{causal_conv<V>, GatedDelta<V, kVectors>::scan,
                                          Mamba<V>::scan};
  return table;
}

}  // namespace
}  // namespace glmcompile
