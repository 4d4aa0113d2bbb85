// What the routers' kernels take. The mirrors are in cometrt/kernels/params.py.
#pragma once

namespace cometrt {

// Indices into KINDS of cometrt/router/options.py and NUMBER_DTYPES of cometrt/router/cuda.py.
enum RouterKind : int { kSoftmax, kSigmoid, kSqrtSoftplus };
enum ElementType : int { kFloat32, kFloat64, kBfloat16, kFloat16, kInt32, kInt64 };

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
  int num_groups, topk_groups, sum_of_two;  // sum_of_two: of a group's scores; else the largest
  int renormalize, mask_stride;             // mask_stride: between tokens, 0 or E
  int logits_type, bias_type, dweights_type, ids_are_64, padding;
};

// What the losses take besides: B sequences of sequence_tokens tokens, added up in chunks. The
// kernels pass each other chunk_sums, pairs, factors, terms and denominator.
struct RouterLossParams {
  const void* counts;  // [E], pairs of the global batch; null: those of the ids
  const void* dloss;   // [1]; null: dloss_value
  double dloss_value;
  double* loss;            // [1]
  double* chunk_sums;      // [B * chunks_per_sequence, 2 E + 2]; [.., 2] for the z-loss
  double* pairs;           // [B, E], which the balance loss compares with probabilities
  double* factors;         // [B], of the balance loss
  double* terms;           // [B * groups of 32 experts, 2]: numerator and denominator of the loss
  double* denominator;     // [1], of the loss
  unsigned int* num_done;  // blocks of router_loss_totals that have written their terms
  int sequence_tokens, chunks_per_sequence, chunk_tokens;
  int balance;  // 1: the balance loss; 0: the z-loss
  int counts_type, dloss_type;
};

struct RouterLoadParams {
  const void* ids;     // [num_ids]: int32 or int64
  int* counts;         // [E + 1]; the last is the number of experts without a pair
  double* statistics;  // [3]: imbalance, variation, dropped
  long long num_ids;
  int num_experts, ids_are_64;
};

struct RouterBiasParams {
  void* bias;          // [E], bias_stride elements apart
  const void* counts;  // [E]
  double rate;
  int num_experts, bias_stride, bias_type, counts_type;
};

}  // namespace cometrt
