#include "attention_float.h"
#include "attention_vec_avx2.h"

namespace glmcompile {

const AttentionKernels& attention_float_avx2(Element element) {
  return float_kernels<VecAvx2>(element);
}

}  // namespace glmcompile
