#include "linear_w8a8.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>

#include "linear_tasks.h"

namespace glmcompile {
namespace {

// Rows quantized at a time: bounds the scratch memory of long prefills and keeps it in cache.
constexpr std::int64_t kScratchBytes = 4 << 20;
constexpr std::int64_t kMinChunkRows = 256;
// Elements quantized by one task; fewer are not worth waking a thread for.
constexpr std::int64_t kQuantizeTaskElements = 8 << 10;

// Grow-only memory of the calling thread: concurrent runs have a thread each.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  std::uint8_t* reserve(std::int64_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      const auto size = static_cast<std::size_t>((bytes + 4095) / 4096 * 4096);
      data_ = static_cast<std::uint8_t*>(std::aligned_alloc(64, size));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = static_cast<std::int64_t>(size);
    }
    return data_;
  }

 private:
  std::uint8_t* data_ = nullptr;
  std::int64_t capacity_ = 0;
};

thread_local Scratch scratch;

Activation parse_activation(const std::string& name) {
  if (name.empty()) return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "quick_gelu") return Activation::kQuickGelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "swiglu") return Activation::kSwiglu;
  fail("attribute activation: \"", name,
       "\" is none of \"\", gelu, gelu_tanh, quick_gelu, silu, swiglu");
}

void check_vector(const Tensor& tensor, std::int64_t size) {
  check(tensor.rank() == 1 && tensor.dim(0) == size, tensor.name(), ": expected [", size,
        "], got ", tensor.shape_text());
}

void multiply(const KernelContext& context, const LinearTasks& tasks) {
  context.parallel_for(static_cast<std::size_t>(tasks.count()), [&](std::size_t task) {
    tasks.run(static_cast<std::int64_t>(task));
  });
}

}  // namespace

void check_packed_weight(const Tensor& weight, std::int64_t out_features,
                         std::int64_t in_features) {
  const std::int64_t expected[] = {ceil_div(out_features, kBlockN), ceil_div(in_features, kBlockK),
                                   kBlockK / 4, kBlockN, 4};
  check(weight.rank() == 5 && std::equal(expected, expected + 5, weight.shape()),
        "weight: expected [", expected[0], ", ", expected[1], ", 16, 16, 4] for out_features ",
        out_features, " and in_features ", in_features, ", got ", weight.shape_text());
}

LinearW8A8::LinearW8A8(const KernelInfo& info)
    : in_features_(info.required<std::int64_t>("in_features")),
      out_features_(info.required<std::int64_t>("out_features")),
      activation_(parse_activation(info.attribute<std::string>("activation", ""))),
      kernel_(select_linear_kernel()) {
  check(in_features_ > 0 && in_features_ <= kMaxInFeatures, "attribute in_features: expected 1 to ",
        kMaxInFeatures, ", got ", in_features_);
  check(out_features_ > 0, "attribute out_features: expected a positive number, got ",
        out_features_);
  check(activation_ != Activation::kSwiglu || out_features_ % (2 * kBlockN) == 0,
        "attribute out_features: expected a multiple of 32 with swiglu, got ", out_features_);
  range_.scale = info.attribute<float>("activation_scale", 0.0f);
  check(std::isfinite(range_.scale) && range_.scale >= 0.0f,
        "attribute activation_scale: expected a finite number >= 0, got ", range_.scale);
  const float zero_point = info.attribute<float>("activation_zero_point", 0.0f);
  check(zero_point >= 0.0f && zero_point <= 255.0f && zero_point == std::nearbyint(zero_point),
        "attribute activation_zero_point: expected an integer in 0 to 255, got ", zero_point);
  range_.zero_point = static_cast<std::int32_t>(zero_point);
  rms_epsilon_ = info.attribute<float>("rms_epsilon", 0.0f);
  check(std::isfinite(rms_epsilon_) && rms_epsilon_ >= 0.0f,
        "attribute rms_epsilon: expected a finite number >= 0, got ", rms_epsilon_);
  check(rms_epsilon_ == 0.0f || range_.scale == 0.0f,
        "attribute rms_epsilon: expected 0 with activation_scale, whose range is static");

  const auto constant = [&](std::size_t i) { return info.constant_input(i, kInputs[i].name); };
  const Parameters constants{constant(1), constant(2), constant(3), constant(4), constant(6)};
  if (constants.weight && constants.weight_scale && constants.weight_sum) {
    check_parameters(constants);
    constants_ = constants;
  }
}

void LinearW8A8::check_parameters(const Parameters& parameters) const {
  check_packed_weight(parameters.weight, out_features_, in_features_);
  check_vector(parameters.weight_scale, out_features_);
  check_vector(parameters.weight_sum, out_features_);
  check_vectors(parameters.bias, parameters.input_scale);
}

void LinearW8A8::check_vectors(const Tensor& bias, const Tensor& input_scale) const {
  if (bias) check_vector(bias, out_features_);
  if (input_scale) check_vector(input_scale, in_features_);
}

void LinearW8A8::compute(KernelContext& context) const {
  const Tensor x = context.input(0), residual = context.input(5);
  check(x.rank() >= 1 && x.dim(x.rank() - 1) == in_features_, "x: expected [..., ", in_features_,
        "], got ", x.shape_text());
  Parameters parameters = constants_;
  if (!parameters.weight) {
    parameters = {context.input(1), context.input(2), context.input(3), context.input(4),
                  context.input(6)};
    check_parameters(parameters);
  } else if (!parameters.bias || !parameters.input_scale) {
    if (!parameters.bias) parameters.bias = context.input(4);
    if (!parameters.input_scale) parameters.input_scale = context.input(6);
    check_vectors(parameters.bias, parameters.input_scale);
  }

  const std::int64_t width =
      activation_ == Activation::kSwiglu ? out_features_ / 2 : out_features_;
  std::int64_t shape[Tensor::kMaxRank];
  std::copy(x.shape(), x.shape() + x.rank(), shape);
  shape[x.rank() - 1] = width;
  if (residual) {
    check(residual.rank() == x.rank() && std::equal(shape, shape + x.rank(), residual.shape()),
          "residual: expected x's shape with a last dimension of ", width, " (x is ",
          x.shape_text(), "), got ", residual.shape_text());
  }
  const float* input = x.data<float>();
  const RowQuantizer quantizer{
      range_, parameters.input_scale ? parameters.input_scale.data<float>() : nullptr,
      rms_epsilon_};
  check(rms_epsilon_ == 0.0f || quantizer.input_scale != nullptr,
        "input_scale: needed beside rms_epsilon, it holds the weight of the normalization");
  float* output = context.output(0, shape, x.rank()).data<float>();
  const std::int64_t rows = x.size() / in_features_;
  if (rows == 0) return;

  LinearProblem problem{};
  problem.out_features = out_features_;
  problem.k_blocks = ceil_div(in_features_, kBlockK);
  problem.weight = parameters.weight.data<std::int8_t>();
  problem.weight_scale = parameters.weight_scale.data<float>();
  problem.weight_sum = parameters.weight_sum.data<std::int32_t>();
  problem.bias = parameters.bias ? parameters.bias.data<float>() : nullptr;
  problem.activation = activation_;
  problem.output_width = width;
  // An odd number of cache lines: rows at a power of two would share few sets of the L1 cache.
  problem.row_stride = (problem.k_blocks * kernel_.element_bytes | 1) * kBlockK;

  const std::int64_t chunk =
      std::min(rows, std::max(kScratchBytes / problem.row_stride / kTaskRows * kTaskRows,
                              kMinChunkRows));
  const std::int64_t padded = ceil_div(chunk, kMaxTileRows) * kMaxTileRows;
  std::uint8_t* data = scratch.reserve(padded * (problem.row_stride + 8));
  float* row_scale = reinterpret_cast<float*>(data + padded * problem.row_stride);
  std::int32_t* row_zero_point = reinterpret_cast<std::int32_t*>(row_scale + padded);
  problem.rows = data;
  problem.row_scale = row_scale;
  problem.row_zero_point = row_zero_point;

  const std::int64_t group =
      std::max<std::int64_t>(kQuantizeTaskElements / in_features_, 1);
  for (std::int64_t begin = 0; begin < rows; begin += chunk) {
    const std::int64_t count = std::min(chunk, rows - begin);
    context.parallel_for(static_cast<std::size_t>(ceil_div(count, group)), [&](std::size_t task) {
      const std::int64_t first = static_cast<std::int64_t>(task) * group;
      for (std::int64_t row = first; row < std::min(first + group, count); ++row) {
        kernel_.quantize_row(input + (begin + row) * in_features_, in_features_,
                             problem.k_blocks * kBlockK, quantizer,
                             data + row * problem.row_stride, row_scale + row,
                             row_zero_point + row);
      }
    });
    problem.output = output + begin * width;
    problem.residual = residual ? residual.data<float>() + begin * width : nullptr;
    multiply(context, LinearTasks(kernel_, problem, count));
  }
}

}  // namespace glmcompile
