#include "attention_float.h"
#include "attention_vec_portable.h"

namespace glmcompile {

const AttentionKernels& attention_float_portable(Element element) {
  return float_kernels<VecPortable>(element);
}

}  // namespace glmcompile
