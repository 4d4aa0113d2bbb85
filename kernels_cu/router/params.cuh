// Parameters of the routers' kernels. Mirrored in cometrt/kernels/params.py.
#pragma once

namespace cometrt {

// Indices into KINDS of cometrt/router/options.py and DTYPES of cometrt/router/cuda.py.
enum RouterKind : int { kSoftmax, kSigmoid, kSqrtSoftplus };
enum ElementType : int { kFloat32, kFloat64, kBfloat16, kFloat16 };

struct RouterParams {
  const void* logits;                       // [T, E]
  const void* bias;                         // [E]; null: none
  const unsigned char* mask;                // [E] or [T, E], 0: may not be chosen; null: none
  const void* ids;                          // [T, K] of a caller: int32 or int64
  const void* dweights;                     // [T, K]
  int* out_ids;                             // [T, K]
  float* out_weights;                       // [T, K]
  float* dlogits;                           // [T, E]
  double scale;                             // factor on the weights
  int num_tokens, num_experts, topk, kind;  // T, E, K, RouterKind
  int num_groups, topk_groups, sum_of_two;  // sum_of_two: a group's score is its two best ones' sum
  int renormalize, mask_stride;             // mask_stride: between tokens, 0 or E
  int logits_type, bias_type, dweights_type, ids_are_64, padding;
};

// Further parameters of the losses, for B sequences of sequence_tokens tokens.
struct RouterLossParams {
  double* sums;                   // [B * chunks_per_sequence, 2 E + 3]
  const double* fractions;        // [B, E], or [E] with a stride of 0; null: no balance loss
  const double* balance_factors;  // [B]
  const double* z_factor;         // [1]; null: no z-loss
  int sequence_tokens, chunks_per_sequence, fractions_stride, padding;
};

}  // namespace cometrt
