// Which instructions' ceilings are measured.
#include "ceilings.h"

#include "linear_problem.h"

namespace glmcompile {

const Ceilings& select_ceilings() {
  [[maybe_unused]] const LinearKernel* kernel = &select_linear_kernel();
#if defined(__x86_64__)
  if (kernel == &linear_kernel_amx()) return ceilings_amx();
  if (kernel == &linear_kernel_avx512()) return ceilings_avx512();
  if (kernel == &linear_kernel_avxvnni()) return ceilings_avxvnni();
  if (kernel == &linear_kernel_avx2()) return ceilings_avx2();
#endif
  return ceilings_portable();
}

}  // namespace glmcompile
