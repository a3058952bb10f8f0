#include "linear_vec_avx2.h"
#include "recurrent_tables.h"

namespace glmcompile {

const RecurrentKernels& recurrent_avx2() { return recurrent_table<VecAvx2, 2>(); }

}  // namespace glmcompile
