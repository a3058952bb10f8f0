#include "packed_sequences.h"

#include <algorithm>
#include <cstring>

namespace glmcompile {

std::vector<PackedSequence> read_sequences(const Tensor& slots, const Tensor& cumulative,
                                           const Tensor& past, int64_t tokens, int64_t num_slots) {
  check(cumulative.rank() == 1 && cumulative.dim(0) >= 1, cumulative.name(),
        ": expected [sequences + 1], got ", cumulative.shape_text());
  const int64_t count = cumulative.dim(0) - 1;
  for (const Tensor* each : {&slots, &past}) expect_shape(*each, {count});
  const int32_t *ends = cumulative.data<int32_t>(), *slot = slots.data<int32_t>(),
                *seen = past.data<int32_t>();
  check(ends[0] == 0, cumulative.name(), ": must start with 0, got ", ends[0]);
  for (int64_t i = 0; i < count; ++i)
    check(ends[i] <= ends[i + 1], cumulative.name(), ": decreases from ", ends[i], " to ",
          ends[i + 1], " at ", i + 1);
  check(ends[count] == tokens, cumulative.name(), ": must end with the number of tokens ", tokens,
        ", got ", ends[count]);

  std::vector<PackedSequence> sequences;
  for (int64_t i = 0; i < count; ++i) {
    check(seen[i] >= 0, past.name(), ": entry ", i, " is negative: ", seen[i]);
    if (ends[i] == ends[i + 1]) continue;
    check(slot[i] >= 0 && slot[i] < num_slots, slots.name(), ": entry ", i, " is ", slot[i],
          ", expected a slot below ", num_slots);
    sequences.push_back({ends[i], ends[i + 1] - ends[i], slot[i], seen[i] == 0});
  }

  std::vector<int64_t> taken;
  for (const PackedSequence& sequence : sequences) taken.push_back(sequence.slot);
  std::sort(taken.begin(), taken.end());
  const auto twice = std::adjacent_find(taken.begin(), taken.end());
  if (twice != taken.end())
    fail(slots.name(), ": expected a slot of its own for every sequence, got slot ", *twice,
         " more than once");
  return sequences;
}

void expect_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor && tensor.rank() == shape.size() &&
      std::equal(shape.begin(), shape.end(), tensor.shape()))
    return;
  std::string wanted;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  fail(tensor.name(), ": expected [", wanted, "], got ",
       tensor ? tensor.shape_text() : "none");
}

void return_pool(const Tensor& pool, const Tensor& output) {
  if (!output || output.raw() == pool.raw() || pool.size() == 0) return;
  std::memcpy(output.raw(), pool.raw(), static_cast<size_t>(pool.size()) * sizeof(float));
}

}  // namespace glmcompile
