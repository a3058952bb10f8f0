// Which linear kernel a session gets.
#include "cpu_features.h"
#include "linear_problem.h"

namespace glmcompile {

const LinearKernel& select_linear_kernel() {
#if defined(__x86_64__)
  if (selected_isa() >= Isa::kAvx512) return linear_kernel_avx512();
#else
  selected_isa();  // still refuses an unknown GLMCOMPILE_ISA
#endif
  return linear_kernel_portable();
}

}  // namespace glmcompile
