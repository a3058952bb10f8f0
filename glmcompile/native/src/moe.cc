#include "moe.h"

#include "scratch_buffer.h"

namespace glmcompile {
namespace {

// Below this many rows the weights' bandwidth decides how large a task is, above it the work.
constexpr std::int64_t kStreamingRows = 16;
constexpr std::int64_t kStreamingTaskBytes = 256 << 10;
constexpr std::int64_t kTaskWork = 4 << 20;  // multiply-accumulates
// Rows of weights [in, out] are read in runs of a task's width.
constexpr std::int64_t kMinRunColumns = 256;
constexpr std::int64_t kMaxTaskColumns = 1024;
// Rows of one task; beyond them its weights are read again.
constexpr std::int64_t kTaskRows = 256;
// Fewer columns read many rows of activations for little work.
constexpr std::int64_t kMinColumnsManyRows = 64;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t padded(std::int64_t n) { return ceil_div(n, kMoELanes) * kMoELanes; }
// An odd number of cache lines: rows at a power of two would share few sets of the L1 cache.
std::int64_t row_stride(std::int64_t n) { return (ceil_div(n, kMoELanes) | 1) * kMoELanes; }

// How one expert's rows and columns are cut into tasks. Tasks that share weights stand together.
class Tasks {
 public:
  // depth: multiply-accumulates of one row and column.
  Tasks(std::int64_t rows, std::int64_t columns, std::int64_t depth, bool transposed)
      : rows_(rows), columns_(columns) {
    row_tasks_ = ceil_div(rows, kTaskRows);
    task_rows_ = ceil_div(rows, row_tasks_);
    const auto bytes = depth * static_cast<std::int64_t>(sizeof(float));
    std::int64_t least = rows < kStreamingRows ? kMoELanes : kMinColumnsManyRows;
    if (transposed && rows <= kMoEFewRows) least = kMinRunColumns;
    const std::int64_t wanted = rows < kStreamingRows ? kStreamingTaskBytes / bytes
                                                      : kTaskWork / (depth * task_rows_);
    task_columns_ = padded(std::clamp(wanted, least, kMaxTaskColumns));
  }

  std::int64_t count() const { return row_tasks_ * ceil_div(columns_, task_columns_); }

  struct Range {
    std::int64_t first_row, last_row, first_column, last_column;
  };
  Range range(std::int64_t task) const {
    const std::int64_t row = task % row_tasks_ * task_rows_;
    const std::int64_t column = task / row_tasks_ * task_columns_;
    return {row, std::min(row + task_rows_, rows_), column,
            std::min(column + task_columns_, columns_)};
  }

 private:
  std::int64_t rows_, columns_, row_tasks_, task_rows_, task_columns_;
};

thread_local ScratchBuffer rows_scratch;  // of the thread that runs the operator
thread_local ScratchBuffer task_scratch;  // of the threads that run its tasks

float* reserve(ScratchBuffer& buffer, std::int64_t floats) {
  return reinterpret_cast<float*>(
      buffer.reserve(static_cast<std::size_t>(floats) * sizeof(float)));
}

}  // namespace

struct MoE::Layers {
  ExpertLayer first;
  std::int64_t experts;

  ExpertLayer expert(std::int64_t index) const {
    ExpertLayer layer = first;
    layer.weight += index * layer.in_features * layer.out_features;
    if (layer.bias != nullptr) layer.bias += index * layer.out_features;
    return layer;
  }
};

MoE::MoE(const KernelInfo& info)
    : gating_(read_gating(info)),
      interleaved_(read_flag(info, "interleaved", false)),
      transposed_(read_flag(info, "transposed", false)),
      kernels_(select_moe_kernels()) {
  check(gating_.gated || !interleaved_, "attribute interleaved: expected 0 without a gate, got 1");
}

MoE::Layers MoE::up_layers(const KernelContext& context, std::int64_t width) const {
  const Tensor up = context.input(3), bias = context.input(5);
  const char* layout = transposed_ ? "[E, H, N]" : "[E, N, H]";
  check(up.rank() == 3 && up.dim(0) > 0 && up.dim(transposed_ ? 2 : 1) > 0 &&
            up.dim(transposed_ ? 1 : 2) == width,
        "up: expected ", layout, " with H = ", width, ", got ", up.shape_text());
  const std::int64_t experts = up.dim(0), channels = up.dim(transposed_ ? 2 : 1);
  check(!gating_.gated || channels % 2 == 0, "up: expected ", layout,
        " with an even N, gates and ups, got ", up.shape_text());
  if (bias) check_shape(bias, {experts, channels}, "[E, N]");
  return {{up.data<float>(), bias ? bias.data<float>() : nullptr, width, channels, transposed_},
          experts};
}

MoE::Layers MoE::down_layers(const KernelContext& context, const Layers& up) const {
  const Tensor down = context.input(4), bias = context.input(6);
  const std::int64_t inner = up.first.out_features / (gating_.gated ? 2 : 1);
  const std::int64_t width = up.first.in_features;
  if (transposed_) check_shape(down, {up.experts, inner, width}, "[E, I, H]");
  else check_shape(down, {up.experts, width, inner}, "[E, H, I]");
  if (bias) check_shape(bias, {up.experts, width}, "[E, H]");
  return {{down.data<float>(), bias ? bias.data<float>() : nullptr, inner, width, transposed_},
          up.experts};
}

void MoE::compute(KernelContext& context) const {
  const Tensor x = context.input(0);
  check(x.rank() == 2 && x.dim(1) > 0, "x: expected [tokens, H], got ", x.shape_text());
  const Layers up = up_layers(context, x.dim(1)), down = down_layers(context, up);
  const RoutedTokens routed = routed_tokens(x, context.input(1), context.input(2), up.experts);
  float* output = context.output(0, x.shape(), 2).data<float>();
  const std::int64_t floats =
      row_stride(down.first.in_features) + row_stride(down.first.out_features);
  const std::int64_t chunk =
      tokens_per_chunk(routed, floats * static_cast<std::int64_t>(sizeof(float)));
  for (std::int64_t begin = 0; begin < routed.tokens; begin += chunk) {
    run(context, routed.slice(begin, std::min(chunk, routed.tokens - begin)), up, down,
        output + begin * routed.width);
  }
}

void MoE::run(const KernelContext& context, const RoutedTokens& routed, const Layers& up,
              const Layers& down, float* output) const {
  const std::int64_t inner = down.first.in_features, width = routed.width;
  const std::int64_t hidden_stride = row_stride(inner), result_stride = row_stride(width);
  const Routing routing(routed, up.experts);
  float* hidden = reserve(rows_scratch, routed.rows() * (hidden_stride + result_stride));
  float* results = hidden + routed.rows() * hidden_stride;

  std::vector<const float*> inputs, hiddens;
  for (std::int64_t row = 0; row < routed.rows(); ++row) {
    inputs.push_back(routed.x + routing.token[static_cast<std::size_t>(row)] * width);
    hiddens.push_back(hidden + row * hidden_stride);
  }
  std::vector<Tasks> up_tasks, down_tasks;
  for (const Routing::Group& group : routing.groups) {
    up_tasks.emplace_back(group.rows(), inner, up.first.out_features / inner * width, transposed_);
    down_tasks.emplace_back(group.rows(), width, inner, transposed_);
  }

  for_each_task(context, up_tasks, [&](std::size_t index, std::int64_t task) {
    const Routing::Group& group = routing.groups[index];
    const Tasks::Range range = up_tasks[index].range(task);
    const std::int64_t row = group.begin + range.first_row;
    run_up(inputs.data() + row, range.last_row - range.first_row, up.expert(group.expert),
           range.first_column, range.last_column,
           hidden + row * hidden_stride + range.first_column, hidden_stride);
  });
  for_each_task(context, down_tasks, [&](std::size_t index, std::int64_t task) {
    const Routing::Group& group = routing.groups[index];
    const Tasks::Range range = down_tasks[index].range(task);
    const std::int64_t row = group.begin + range.first_row;
    kernels_.multiply(hiddens.data() + row, range.last_row - range.first_row,
                      down.expert(group.expert), range.first_column, range.last_column,
                      results + row * result_stride + range.first_column, result_stride);
  });
  combine_choices(context, kernels_, routed, routing, results, result_stride, width, output);
}

// out [count, last - first]: the inner channels [first, last) after the activation.
void MoE::run_up(const float* const* rows, std::int64_t count, const ExpertLayer& layer,
                 std::int64_t first, std::int64_t last, float* out,
                 std::int64_t out_stride) const {
  const std::int64_t columns = last - first;
  if (!gating_.gated) {
    kernels_.multiply(rows, count, layer, first, last, out, out_stride);
    for (std::int64_t row = 0; row < count; ++row, out += out_stride) {
      kernels_.activate(gating_, out, nullptr, 1, columns, out);
    }
    return;
  }
  const std::int64_t half = padded(columns), stride = 2 * half;
  float* raw = reserve(task_scratch, count * stride);
  if (interleaved_) {
    kernels_.multiply(rows, count, layer, 2 * first, 2 * last, raw, stride);
  } else {
    const std::int64_t ups = layer.out_features / 2;
    kernels_.multiply(rows, count, layer, first, last, raw, stride);
    kernels_.multiply(rows, count, layer, ups + first, ups + last, raw + half, stride);
  }
  for (std::int64_t row = 0; row < count; ++row, raw += stride, out += out_stride) {
    if (interleaved_) kernels_.activate(gating_, raw, raw + 1, 2, columns, out);
    else kernels_.activate(gating_, raw, raw + half, 1, columns, out);
  }
}

}  // namespace glmcompile
