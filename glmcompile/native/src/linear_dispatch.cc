// Which linear kernel a session gets.
#include "cpu_features.h"
#include "linear_problem.h"

#include <cstdlib>
#include <cstring>

namespace glmcompile {

const LinearKernel& select_linear_kernel() {
#if defined(__x86_64__)
  // VEX-encoded VNNI is not a level of its own: processors with AVX-512 may have or lack it.
  const char* cap = std::getenv("GLMCOMPILE_ISA");
  const bool capped = cap != nullptr && *cap != '\0';
  const bool avx_vnni = cpu_features().avx_vnni;
  if (capped && std::strcmp(cap, "avx_vnni") == 0) {
    return avx_vnni ? linear_kernel_avxvnni() : linear_kernel_portable();
  }
#endif
  [[maybe_unused]] const Isa isa = selected_isa();
  if (amx_emulation_requested()) return linear_kernel_amx_emulated();
#if defined(__x86_64__)
  if (isa >= Isa::kAmx) return linear_kernel_amx();
  if (isa >= Isa::kAvx512) return linear_kernel_avx512();
  if (isa >= Isa::kAvx2) {
    return avx_vnni && !capped ? linear_kernel_avxvnni() : linear_kernel_avx2();
  }
#endif
  return linear_kernel_portable();
}

}  // namespace glmcompile
