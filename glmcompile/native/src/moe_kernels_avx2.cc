// Mixture-of-experts kernels for AVX2 and FMA: twelve of sixteen registers hold sums.
#include "linear_vec_avx2.h"
#include "moe_gating.h"
#include "moe_multiply.h"

namespace glmcompile {
namespace {

struct TileAvx2 {
  using V = VecAvx2;
  static constexpr int kRows = 3, kColumns = 2;

  static void sum_channels(const V::F* acc, float* sums) {
    for (int c = 0; c < kColumns; ++c) sums[c] = V::reduce_sum(acc[c]);
  }
};

}  // namespace

const MoEKernels& moe_kernels_avx2() {
  static const MoEKernels kernels = {multiply<TileAvx2>, activate<VecAvx2>, combine<VecAvx2>};
  return kernels;
}

}  // namespace glmcompile
