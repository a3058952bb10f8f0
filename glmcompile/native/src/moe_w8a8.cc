#include "moe_w8a8.h"

#include "linear_tasks.h"
#include "scratch_buffer.h"

namespace glmcompile {
namespace {

thread_local ScratchBuffer rows_scratch;    // of the thread that runs the operator
thread_local ScratchBuffer hidden_scratch;  // of the threads that run its tasks

// A pair of gate and up blocks, which LinearW8A8's swiglu wants, too.
constexpr std::int64_t kPair = 2 * kBlockN;

}  // namespace

struct MoEW8A8::Layers {
  std::int64_t experts, in_features, out_features;
  const std::int8_t* weight;
  const float* scale;
  const std::int32_t* sum;
  const float* bias;         // or null
  const float* input_scale;  // or null
  Activation activation = Activation::kNone;

  std::int64_t k_blocks() const { return ceil_div(in_features, kBlockK); }
  std::int64_t width() const {
    return activation == Activation::kSwiglu ? out_features / 2 : out_features;
  }
  RowQuantizer quantizer(std::int64_t expert) const {
    return {{0.0f, 0}, input_scale ? input_scale + expert * in_features : nullptr, 0.0f};
  }
  LinearProblem problem(std::int64_t expert) const {
    LinearProblem problem{};
    problem.out_features = out_features;
    problem.k_blocks = k_blocks();
    problem.weight = weight + expert * ceil_div(out_features, kBlockN) * problem.block_bytes();
    problem.weight_scale = scale + expert * out_features;
    problem.weight_sum = sum + expert * out_features;
    problem.bias = bias ? bias + expert * out_features : nullptr;
    problem.activation = activation;
    problem.output_width = width();
    return problem;
  }
};

struct MoEW8A8::Quantized {
  std::uint8_t* data;  // [rows], in memory of whole tiles
  std::int64_t stride;
  float* scale;
  std::int32_t* zero_point;

  // An odd number of cache lines: rows at a power of two would share few sets of the L1 cache.
  static std::int64_t row_stride(const LinearKernel& kernel, const Layers& layers) {
    return (layers.k_blocks() * kernel.element_bytes | 1) * kBlockK;
  }
  void quantize(const LinearKernel& kernel, const Layers& layers, const float* x,
                std::int64_t expert, std::int64_t row) const {
    kernel.quantize_row(x, layers.in_features, layers.k_blocks() * kBlockK,
                        layers.quantizer(expert), data + row * stride, scale + row,
                        zero_point + row);
  }
};

MoEW8A8::MoEW8A8(const KernelInfo& info)
    : gating_(read_gating(info)),
      fused_(gating_.gated && gating_.activation == ExpertActivation::kSilu &&
             gating_.up_limit == Gating::kNone),
      linear_(select_linear_kernel()),
      kernels_(select_moe_kernels()) {}

// The layer whose weight is input number `weight`: 3 or 6, its scale and sum stand behind it.
MoEW8A8::Layers MoEW8A8::layers(const KernelContext& context, std::size_t weight,
                                std::int64_t experts, std::int64_t in_features,
                                std::int64_t out_features) const {
  const std::size_t number = (weight - 3) / 3;  // of the layer
  const Tensor packed = context.input(weight), scale = context.input(weight + 1),
               sum = context.input(weight + 2), bias = context.input(9 + number),
               input_scale = context.input(11 + number);
  check(in_features > 0 && in_features <= kMaxInFeatures, packed.name(),
        ": expected 1 to ", kMaxInFeatures, " input features, got ", in_features);
  check_shape(packed,
              {experts, ceil_div(out_features, kBlockN), ceil_div(in_features, kBlockK),
               kBlockK / 4, kBlockN, 4},
              "the packed form of [E, out, in]");
  check_shape(scale, {experts, out_features}, "[E, out]");
  check_shape(sum, {experts, out_features}, "[E, out]");
  if (bias) check_shape(bias, {experts, out_features}, "[E, out]");
  if (input_scale) check_shape(input_scale, {experts, in_features}, "[E, in]");
  return {experts,
          in_features,
          out_features,
          packed.data<std::int8_t>(),
          scale.data<float>(),
          sum.data<std::int32_t>(),
          bias ? bias.data<float>() : nullptr,
          input_scale ? input_scale.data<float>() : nullptr};
}

void MoEW8A8::compute(KernelContext& context) const {
  const Tensor x = context.input(0), up_scale = context.input(4);
  check(x.rank() == 2 && x.dim(1) > 0, "x: expected [tokens, H], got ", x.shape_text());
  check(up_scale.rank() == 2 && up_scale.dim(0) > 0 && up_scale.dim(1) > 0,
        "up_scale: expected [E, N], got ", up_scale.shape_text());
  const std::int64_t width = x.dim(1), experts = up_scale.dim(0), channels = up_scale.dim(1);
  check(!gating_.gated || channels % kPair == 0,
        "up_scale: expected [E, N] with a multiple of 32 for N, gates and ups, got ",
        up_scale.shape_text());
  const std::int64_t inner = gating_.gated ? channels / 2 : channels;
  Layers up = layers(context, 3, experts, width, channels);
  const Layers down = layers(context, 6, experts, inner, width);
  if (fused_) up.activation = Activation::kSwiglu;
  const RoutedTokens routed = routed_tokens(x, context.input(1), context.input(2), experts);
  float* output = context.output(0, x.shape(), 2).data<float>();
  const std::int64_t bytes = (up.width() + width) * static_cast<std::int64_t>(sizeof(float)) +
                             std::max(Quantized::row_stride(linear_, up),
                                      Quantized::row_stride(linear_, down));
  const std::int64_t chunk = tokens_per_chunk(routed, bytes);
  for (std::int64_t begin = 0; begin < routed.tokens; begin += chunk) {
    run(context, routed.slice(begin, std::min(chunk, routed.tokens - begin)), up, down,
        output + begin * width);
  }
}

void MoEW8A8::run(const KernelContext& context, const RoutedTokens& routed, const Layers& up,
                  const Layers& down, float* output) const {
  const Routing routing(routed, up.experts);
  const std::int64_t width = routed.width, inner = down.in_features, rows = routed.rows();
  // The kernels read whole tiles of rows.
  const std::int64_t padded = rows + kMaxTileRows;
  const std::int64_t up_stride = Quantized::row_stride(linear_, up);
  const std::int64_t down_stride = Quantized::row_stride(linear_, down);
  const std::int64_t quantized_bytes = padded * std::max(up_stride, down_stride);
  const std::int64_t floats = rows * (up.width() + width) + 2 * padded;
  char* memory = rows_scratch.reserve(static_cast<std::size_t>(
      quantized_bytes + floats * static_cast<std::int64_t>(sizeof(float))));
  float* middle = reinterpret_cast<float*>(memory + quantized_bytes);
  float* results = middle + rows * up.width();
  float* scale = results + rows * width;
  Quantized quantized{reinterpret_cast<std::uint8_t*>(memory), up_stride, scale,
                      reinterpret_cast<std::int32_t*>(scale + padded)};

  for_each_item(context, rows, width, [&](std::int64_t row) {
    const auto at = static_cast<std::size_t>(row);
    quantized.quantize(linear_, up, routed.x + routing.token[at] * width, routing.expert[at], row);
  });
  multiply(context, routing, up, quantized, middle);
  quantized.stride = down_stride;
  for_each_item(context, rows, up.out_features, [&](std::int64_t row) {
    const float* hidden = middle + row * up.width();
    if (!fused_) hidden = activate(hidden, inner);
    quantized.quantize(linear_, down, hidden, routing.expert[static_cast<std::size_t>(row)], row);
  });
  multiply(context, routing, down, quantized, results);
  combine_choices(context, kernels_, routed, routing, results, width, width, output);
}

void MoEW8A8::multiply(const KernelContext& context, const Routing& routing, const Layers& layers,
                       const Quantized& rows, float* output) const {
  std::vector<LinearTasks> tasks;
  for (const Routing::Group& group : routing.groups) {
    LinearProblem problem = layers.problem(group.expert);
    problem.rows = rows.data + group.begin * rows.stride;
    problem.row_stride = rows.stride;
    problem.row_scale = rows.scale + group.begin;
    problem.row_zero_point = rows.zero_point + group.begin;
    problem.output = output + group.begin * problem.output_width;
    tasks.emplace_back(linear_, problem, group.rows());
  }
  for_each_task(context, tasks,
                [&](std::size_t group, std::int64_t task) { tasks[group].run(task); });
}

// The row after the activation, in memory of the calling thread.
const float* MoEW8A8::activate(const float* raw, std::int64_t inner) const {
  float* hidden = reinterpret_cast<float*>(
      hidden_scratch.reserve(static_cast<std::size_t>(inner) * sizeof(float)));
  if (!gating_.gated) {
    kernels_.activate(gating_, raw, nullptr, 1, inner, hidden);
    return hidden;
  }
  for (std::int64_t i = 0; i < inner; i += kBlockN, raw += kPair) {
    kernels_.activate(gating_, raw, raw + kBlockN, 1, kBlockN, hidden + i);
  }
  return hidden;
}

}  // namespace glmcompile
