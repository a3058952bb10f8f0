// Which mixture-of-experts kernels a session gets.
#include "moe_kernels.h"

#include "cpu_features.h"

namespace glmcompile {

const MoEKernels& select_moe_kernels() {
  [[maybe_unused]] const Isa isa = selected_isa();
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return moe_kernels_avx512();
  if (isa >= Isa::kAvx2) return moe_kernels_avx2();
#endif
  return moe_kernels_portable();
}

}  // namespace glmcompile
