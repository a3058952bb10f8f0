// Which linear kernel a session gets.
#include "cpu_features.h"
#include "linear_problem.h"

namespace glmcompile {

const LinearKernel& select_linear_kernel() {
  [[maybe_unused]] const Isa isa = selected_isa();
  if (amx_emulation_requested()) return linear_kernel_amx_emulated();
#if defined(__x86_64__)
  if (isa >= Isa::kAmx) return linear_kernel_amx();
  if (isa >= Isa::kAvx512) return linear_kernel_avx512();
  if (isa >= Isa::kAvx2) {
    return cpu_features().avx_vnni ? linear_kernel_avxvnni() : linear_kernel_avx2();
  }
#endif
  return linear_kernel_portable();
}

}  // namespace glmcompile
