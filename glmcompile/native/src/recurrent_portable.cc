#include "linear_vec_portable.h"
#include "recurrent_tables.h"

namespace glmcompile {

const RecurrentKernels& recurrent_portable() { return recurrent_table<VecPortable, 1>(); }

}  // namespace glmcompile
