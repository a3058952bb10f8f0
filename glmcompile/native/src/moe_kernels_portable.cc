// Mixture-of-experts kernels in plain C++, for every CPU.
#include "linear_vec_portable.h"
#include "moe_gating.h"
#include "moe_multiply.h"

namespace glmcompile {
namespace {

struct TilePortable {
  using V = VecPortable;
  static constexpr int kRows = 2, kColumns = 1;

  static void sum_channels(const V::F* acc, float* sums) { sums[0] = V::reduce_sum(acc[0]); }
};

}  // namespace

const MoEKernels& moe_kernels_portable() {
  static const MoEKernels kernels = {multiply<TilePortable>, activate<VecPortable>,
                                     combine<VecPortable>};
  return kernels;
}

}  // namespace glmcompile
