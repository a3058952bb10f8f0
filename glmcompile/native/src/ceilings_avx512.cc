#include "ceilings_loops.h"
#include "linear_vec_avx512.h"

namespace glmcompile {
namespace {

struct Vnni {
  using T = __m512i;
  static constexpr int kMultiplies = 64;
  static T load(const float* from) { return _mm512_loadu_si512(from); }
  static T multiply_add(T acc, T a, T b) { return _mm512_dpbusd_epi32(acc, a, b); }
};

}  // namespace

const Ceilings& ceilings_avx512() {
  static const Ceilings ceilings = {read<VecAvx512>, multiply<Vnni, 16>,
                                    multiply<FloatProduct<VecAvx512>, 16>};
  return ceilings;
}

}  // namespace glmcompile
