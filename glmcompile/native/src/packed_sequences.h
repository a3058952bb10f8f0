// The sequences of a packed batch whose layers keep a state between calls.
//
// A state is one slot of a pool [slots, ...] that the caller binds once and the operators update in
// place. One call advances several sequences by the tokens it holds of each, prefill and decode
// mixed; what a sequence has seen before is in its slot.
#pragma once

#include <initializer_list>
#include <vector>

#include "ort_abi.h"

namespace glmcompile {

struct PackedSequence {
  int64_t first;   // of its tokens, rows of the packed inputs
  int64_t tokens;  // at least one
  int64_t slot;
  bool fresh;  // starts from zeros, whatever the slot holds
};

// The sequences that have tokens in this call. One without tokens takes no part: its slot is
// neither looked at nor reset. Throws Error where the inputs do not fit each other, the number of
// tokens or the number of slots, and where two sequences have one slot.
//   slots: int32 [sequences]; cumulative: int32 [sequences + 1]; past: int32 [sequences]
std::vector<PackedSequence> read_sequences(const Tensor& slots, const Tensor& cumulative,
                                           const Tensor& past, int64_t tokens, int64_t num_slots);

// Throws Error unless the tensor has this shape.
void expect_shape(const Tensor& tensor, std::initializer_list<int64_t> shape);

// Copies an updated pool to the output that aliases it, where the node asks for that and ONNX
// Runtime gave it memory of its own.
void return_pool(const Tensor& pool, const Tensor& output);

}  // namespace glmcompile
