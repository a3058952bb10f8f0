#include "attention_float.h"
#include "attention_vec_avx512.h"

namespace glmcompile {

const AttentionKernels& attention_float_avx512(Element element) {
  return float_kernels<VecAvx512>(element);
}

}  // namespace glmcompile
