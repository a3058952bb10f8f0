#include "packed_mamba2.h"

#include <algorithm>
#include <limits>

#include "packed_sequences.h"
#include "scratch_buffer.h"

namespace glmcompile {
namespace {

constexpr int64_t kTaskState = 8 << 10;  // numbers: fit the L1 cache, and are worth a task

}  // namespace

PackedMamba2::PackedMamba2(const KernelInfo& info)
    : dt_softplus_(info.attribute<int64_t>("dt_softplus", 1) != 0),
      dt_min_(info.attribute<float>("time_step_min", 0.0f)),
      dt_max_(info.attribute<float>("time_step_max", std::numeric_limits<float>::infinity())),
      kernels_(&recurrent_kernels(selected_isa())) {
  check(dt_min_ <= dt_max_, "attribute time_step_min: expected at most time_step_max ", dt_max_,
        ", got ", dt_min_);
}

void PackedMamba2::compute(KernelContext& context) const {
  const Tensor x = context.input(kX), dt = context.input(kDt), a = context.input(kA),
               b = context.input(kB), c = context.input(kC), d = context.input(kD),
               dt_bias = context.input(kDtBias), pool = context.input(kState);
  check(pool.rank() == 4 && pool.dim(1) > 0 && pool.dim(2) > 0 && pool.dim(3) > 0,
        "state: expected [slots, heads, head_size, state_size], got ", pool.shape_text());
  const int64_t heads = pool.dim(1), head_size = pool.dim(2), state_size = pool.dim(3);
  const int64_t width = heads * head_size;
  check(x.rank() == 2 && x.dim(1) == width, "x: expected [tokens, ", width, "], got ",
        x.shape_text());
  const int64_t tokens = x.dim(0);
  expect_shape(dt, {tokens, heads});
  const bool a_per_state = a.rank() == 2;
  if (a_per_state) expect_shape(a, {heads, state_size});
  else expect_shape(a, {heads});
  check(b.rank() == 2 && b.dim(0) == tokens && b.dim(1) > 0 && b.dim(1) % state_size == 0 &&
            heads % (b.dim(1) / state_size) == 0,
        "B: expected [", tokens, ", groups * ", state_size, "] with groups that divide ", heads,
        " heads, got ", b.shape_text());
  expect_shape(c, {tokens, b.dim(1)});
  for (const Tensor* each : {&d, &dt_bias})
    if (*each) expect_shape(*each, {heads});
  const std::vector<PackedSequence> sequences =
      read_sequences(context.input(kSlots), context.input(kCumulative), context.input(kPast),
                     tokens, pool.dim(0));

  MambaScan all{};  // what the tasks have in common, pointers at the first token's first head
  all.head_size = head_size;
  all.state_size = state_size;
  all.x = x.data<float>();
  all.x_stride = width;
  all.dt = dt.data<float>();
  all.dt_stride = heads;
  all.dt_bias = dt_bias ? dt_bias.data<float>() : nullptr;
  all.dt_softplus = dt_softplus_;
  all.dt_min = dt_min_;
  all.dt_max = dt_max_;
  all.a = a.data<float>();
  all.a_per_state = a_per_state;
  all.b = b.data<float>();
  all.c = c.data<float>();
  all.bc_stride = b.dim(1);
  all.heads_per_group = heads / (b.dim(1) / state_size);
  all.d = d ? d.data<float>() : nullptr;
  all.state = pool.data<float>();
  all.output = context.output(0, x.shape(), 2).data<float>();
  const Tensor pool_out = context.output(1, pool.shape(), 4);

  const int64_t group =
      std::clamp<int64_t>(kTaskState / (head_size * state_size), 1, heads);
  const int64_t groups = (heads + group - 1) / group;
  context.parallel_for(sequences.size() * static_cast<size_t>(groups), [&](size_t i) {
    const PackedSequence& sequence = sequences[i / static_cast<size_t>(groups)];
    const int64_t head = static_cast<int64_t>(i) % groups * group;
    const int64_t at = sequence.first * width + head * head_size;
    static thread_local ScratchBuffer buffer;
    MambaScan scan = all;
    scan.tokens = sequence.tokens;
    scan.heads = std::min(group, heads - head);
    scan.first_head = head;
    scan.x += at;
    scan.output += at;
    scan.dt += sequence.first * heads + head;
    scan.a += head * (a_per_state ? state_size : 1);
    scan.b += sequence.first * all.bc_stride;
    scan.c += sequence.first * all.bc_stride;
    if (scan.d != nullptr) scan.d += head;
    if (scan.dt_bias != nullptr) scan.dt_bias += head;
    scan.state += (sequence.slot * heads + head) * head_size * state_size;
    scan.scratch = reinterpret_cast<float*>(
        buffer.reserve(static_cast<size_t>(mamba_scratch(scan.heads)) * sizeof(float)));
    if (sequence.fresh)
      std::fill(scan.state, scan.state + scan.heads * head_size * state_size, 0.0f);
    kernels_->mamba_scan(scan);
  });
  return_pool(pool, pool_out);
}

}  // namespace glmcompile
