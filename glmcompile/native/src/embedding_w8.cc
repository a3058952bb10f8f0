#include "embedding_w8.h"

#include <algorithm>
#include <cstring>

#include "linear_w8a8.h"

namespace glmcompile {
namespace {

constexpr std::int64_t kTaskElements = 32 << 10;

void unpack_row(const std::int8_t* weight, std::int64_t row, std::int64_t size, float scale,
                float* out) {
  const std::int64_t block_bytes = ceil_div(size, kBlockK) * kBlockK * kBlockN;
  const std::int8_t* from = weight + row / kBlockN * block_bytes + row % kBlockN * 4;
  std::int64_t k = 0;
  for (; k + 4 <= size; k += 4, from += 4 * kBlockN) {
    for (int i = 0; i < 4; ++i) out[k + i] = scale * static_cast<float>(from[i]);
  }
  for (std::int64_t i = 0; k < size; ++k, ++i) out[k] = scale * static_cast<float>(from[i]);
}

}  // namespace

EmbeddingW8::EmbeddingW8(const KernelInfo& info)
    : hidden_size_(info.required<std::int64_t>("in_features")),
      vocab_size_(info.required<std::int64_t>("out_features")) {
  check(hidden_size_ > 0, "attribute in_features: expected a positive number, got ", hidden_size_);
  check(vocab_size_ > 0, "attribute out_features: expected a positive number, got ", vocab_size_);
}

void EmbeddingW8::compute(KernelContext& context) const {
  const Tensor ids = context.input(0), weight = context.input(1), scale = context.input(2);
  check_packed_weight(weight, vocab_size_, hidden_size_);
  check(scale.rank() == 1 && scale.dim(0) == vocab_size_, "weight_scale: expected [", vocab_size_,
        "], got ", scale.shape_text());
  check(ids.rank() < Tensor::kMaxRank, "ids: rank ", ids.rank(), " is too high");
  const std::int64_t* id = ids.data<std::int64_t>();
  const std::int64_t count = ids.size();
  for (std::int64_t i = 0; i < count; ++i) {
    check(id[i] >= 0 && id[i] < vocab_size_, "ids: expected 0 to ", vocab_size_ - 1, ", got ",
          id[i], " at position ", i);
  }
  std::int64_t shape[Tensor::kMaxRank];
  std::copy(ids.shape(), ids.shape() + ids.rank(), shape);
  shape[ids.rank()] = hidden_size_;
  float* out = context.output(0, shape, ids.rank() + 1).data<float>();
  const std::int8_t* packed = weight.data<std::int8_t>();
  const float* scales = scale.data<float>();
  const std::int64_t group = std::max<std::int64_t>(kTaskElements / hidden_size_, 1);
  context.parallel_for(static_cast<std::size_t>(ceil_div(count, group)), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * group;
    for (std::int64_t i = first; i < std::min(first + group, count); ++i) {
      unpack_row(packed, id[i], hidden_size_, scales[id[i]], out + i * hidden_size_);
    }
  });
}

}  // namespace glmcompile
