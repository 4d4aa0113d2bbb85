// Parameters of the kernels around a rail: what crosses between nodes, before and after a call of a
// node's layer. NCCL moves the messages; these kernels pack, check and add them. Mirrored in
// cometrt/kernels/params.py.
#pragma once

#include <cuda_bf16.h>

#include "protocol/exchange_params.cuh"

namespace cometrt {

// The beginning of a message: what a rank says of its call. All ranks of a rail must agree.
struct RailHeader {
  long long operation, layer, spec_hash, forward_epoch, unused[4];
};

// How a call ended on one node. Indices into OUTCOMES of cometrt/nodes/cuda_rail.py.
enum RailOutcomeKind : u64 { kCompleted, kCallHeld, kCallFailed, kWorldStopped };

struct RailOutcome {
  u64 kind;                      // RailOutcomeKind
  u64 largest_need, wrong_pair;  // of PlanProgress, where the plan of this call failed
  u64 unused;
};

// The first call that failed on another node since the host last looked, in the host's memory.
struct RailReport {
  u64 kind;  // of the outcome; written last, behind a fence
  u64 node;
  u64 largest_need, wrong_pair;
};

// Of one call on one rank. N: nodes. What a call does not use is null or 0. Rows of the rank on
// node i are those from i * max_tokens on.
struct RailParams {
  World world;  // of the node
  long long operation, layer, spec_hash;
  const long long* forward_epoch;  // as in ExchangeParams
  const ExchangeState* state;
  const PlanProgress* progress;  // of a call that makes a plan
  RailReport* report;
  u64* steps;  // [2] in the host's memory: steps of the rail that have begun, and ended
  // Gathered. rows [num_tokens, hidden], ids and weights [num_tokens, topk] are this rank's.
  const void* rows;
  char* all_rows;  // [N * max_tokens, hidden]
  const void* ids;
  const float* weights;
  char* messages;     // [N]: RailHeader, ids and weights [max_tokens, topk]
  u64 message_bytes;  // of each
  int* all_ids;       // [N * max_tokens, topk], of this node's experts
  float* all_weights;
  // Returned. partials [N * max_tokens, hidden] are this node's sums, returned those of other nodes
  // for this rank's tokens.
  const __nv_bfloat16 *partials, *returned;
  __nv_bfloat16* out;  // [num_tokens, hidden]
  const float *dweight_partials, *returned_dweight;
  float* out_dweight;     // [num_tokens, topk]
  RailOutcome* outcomes;  // [N]
  int nodes, node, max_tokens, topk, hidden, num_tokens;
  int num_experts;  // of all nodes
  int id_bytes;     // 4 or 8; 0: the call has no tables

  __device__ RailHeader& header(int of) const {
    return *reinterpret_cast<RailHeader*>(messages + of * message_bytes);
  }
  __device__ int* message_ids(int of) const {
    return reinterpret_cast<int*>(messages + of * message_bytes + sizeof(RailHeader));
  }
  __device__ float* message_weights(int of) const {
    return reinterpret_cast<float*>(message_ids(of) + static_cast<long long>(max_tokens) * topk);
  }
};

}  // namespace cometrt
