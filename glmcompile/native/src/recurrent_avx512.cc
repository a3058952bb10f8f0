#include "linear_vec_avx512.h"
#include "recurrent_tables.h"

namespace glmcompile {

const RecurrentKernels& recurrent_avx512() { return recurrent_table<VecAvx512, 4>(); }

}  // namespace glmcompile
