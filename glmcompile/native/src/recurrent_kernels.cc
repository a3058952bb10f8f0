#include "recurrent_kernels.h"

namespace glmcompile {

const RecurrentKernels& recurrent_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return recurrent_avx512();
  if (isa >= Isa::kAvx2) return recurrent_avx2();
#endif
  static_cast<void>(isa);
  return recurrent_portable();
}

}  // namespace glmcompile
