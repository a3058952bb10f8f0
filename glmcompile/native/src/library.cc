// Entry points of the shared library: the list of operators, registered with ONNX Runtime.

#include <memory>
#include <string>

#include "ceilings.h"
#include "cpu_features.h"
#include "embedding_bag.h"
#include "embedding_w8.h"
#include "linear_problem.h"
#include "linear_w8a8.h"
#include "moe.h"
#include "ort_abi.h"
#include "packed_causal_conv.h"
#include "packed_gated_delta_rule.h"
#include "packed_mamba2.h"
#include "packed_rotary.h"
#include "paged_attention.h"
#include "varlen_attention.h"

#define GLMCOMPILE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace glmcompile;

struct Registration {
  const char* domain;
  const OrtCustomOp* op;
};

template <class Op>
Registration registration() {
  return {Op::kDomain, custom_op<Op>()};
}

// One line per operator; operators of one domain stand together.
const Registration* operators(size_t* count) {
  static const Registration list[] = {
      registration<EmbeddingBag>(),
      registration<EmbeddingW8>(),
      registration<LinearW8A8>(),
      registration<MoE>(),
      registration<PackedCausalConv>(),
      registration<PackedGatedDeltaRule>(),
      registration<PackedMamba2>(),
      registration<PackedRotary>(),
      registration<VarlenAttention>(),
      registration<ExtendedPagedAttention>(),
      registration<PagedAttention>(),
  };
  *count = std::size(list);
  return list;
}

// Domains are referenced by every session that registered the library, so they live as long.
OrtStatus* register_operators(OrtSessionOptions* options) {
  auto create = Api::slot<OrtStatus*(const char*, OrtCustomOpDomain**)>(26);
  auto add_op = Api::slot<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>(27);
  auto add_domain = Api::slot<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>(28);
  struct Domain {
    const char* name;
    OrtCustomOpDomain* handle;
  };
  static Domain domains[] = {{"com.glmcompile", nullptr}, {"com.microsoft", nullptr}};
  size_t count = 0;
  const Registration* list = operators(&count);
  for (Domain& domain : domains) {
    if (domain.handle == nullptr) {
      if (OrtStatus* status = create(domain.name, &domain.handle)) return status;
      for (size_t i = 0; i < count; ++i)
        if (std::string(list[i].domain) == domain.name)
          if (OrtStatus* status = add_op(domain.handle, list[i].op)) return status;
    }
    if (OrtStatus* status = add_domain(options, domain.handle)) return status;
  }
  return nullptr;
}

}  // namespace

GLMCOMPILE_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) return nullptr;  // no table to report with; the session will not find the ops
  Api::set(api);
  return register_operators(options);
}

// The kernel level a session created now would use, e.g. "avx512"; "" if GLMCOMPILE_ISA is invalid.
GLMCOMPILE_EXPORT const char* glmcompile_selected_isa() {
  try {
    return isa_name(selected_isa());
  } catch (const Error&) {
    return "";
  }
}

// The instructions that LinearW8A8 would multiply with now, e.g. "avx512"; "" if GLMCOMPILE_ISA is
// invalid, which must not be when one of the functions below is called.
GLMCOMPILE_EXPORT const char* glmcompile_linear_isa() {
  try {
    return select_linear_kernel().isa;
  } catch (const Error&) {
    return "";
  }
}

// What the calling thread can do at best with those instructions, see ceilings.h.
GLMCOMPILE_EXPORT void glmcompile_read(const float* data, int64_t count) {
  select_ceilings().read(data, count);
}

GLMCOMPILE_EXPORT int64_t glmcompile_multiply_int8(int64_t rounds) {
  return select_ceilings().multiply_int8(rounds);
}

GLMCOMPILE_EXPORT int64_t glmcompile_multiply_float(int64_t rounds) {
  return select_ceilings().multiply_float(rounds);
}
