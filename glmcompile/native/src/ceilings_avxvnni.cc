#include "ceilings_loops.h"
#include "linear_vec_avx2.h"

namespace glmcompile {
namespace {

struct AvxVnni {
  using T = __m256i;
  static constexpr int kMultiplies = 32;
  static T load(const float* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static T multiply_add(T acc, T a, T b) { return _mm256_dpbusd_avx_epi32(acc, a, b); }
};

}  // namespace

const Ceilings& ceilings_avxvnni() {
  static const Ceilings ceilings = {read<VecAvx2>, multiply<AvxVnni, 12>,
                                    multiply<FloatProduct<VecAvx2>, 6>};
  return ceilings;
}

}  // namespace glmcompile
