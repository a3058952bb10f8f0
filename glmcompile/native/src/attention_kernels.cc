#include "attention_kernels.h"

namespace glmcompile {

const AttentionKernels& attention_kernels(Isa isa, Element element, Precision precision) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512)
    return precision == Precision::kInt8 ? attention_int8_avx512(element)
                                            : attention_float_avx512(element);
  if (isa >= Isa::kAvx2) return attention_float_avx2(element);
#endif
  static_cast<void>(isa);
  static_cast<void>(precision);
  return attention_float_portable(element);
}

}  // namespace glmcompile
