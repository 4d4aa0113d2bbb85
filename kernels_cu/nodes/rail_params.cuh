// Parameters of the kernels around a rail: what crosses between nodes, before and after a call of a
// node's layer. NCCL moves the messages; these kernels pack, check and add them. Mirrored in
// cometrt/kernels/params.py.
#pragma once

#include <cuda_bf16.h>

#include "protocol/exchange_params.cuh"

namespace cometrt {

// MAX_RAIL_SLICES of cometrt/plan/config.py.
constexpr int kMaxRailSlices = 16;

// Transfers of a call, by what crosses. RailParams::begins is one more.
enum RailTransfer : u64 { kTokensCross, kPartialsCross };

// The beginning of a message: what a rank says of its call. All ranks of a rail must agree.
struct RailHeader {
  long long operation, layer, spec_hash, forward, unused[4];
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

// Of one call on one rank. N: nodes. What a call does not use is null or 0. Arrays of R rows have
// those of all tokens of the rail, at row_of. Some rows may belong to no token.
struct RailParams {
  World world;  // of the node
  // forward: the number of a backward's forward, or of a planned forward's plan, as hosts count
  // them. Epochs may differ between nodes: a call that does nothing on one of them counts none
  // there.
  long long operation, layer, spec_hash, forward;
  const ExchangeState* state;
  const PlanProgress* progress;  // of a call that makes a plan
  RailReport* report;
  // [3] in the host's memory. 0: the newest transfer that has begun, 2 * number + RailTransfer.
  // 1: the newest that has ended. 2: of the call whose plan failed, layer * 256 + slice + 1, until
  // the host has raised its error.
  u64* steps;
  // Gathered. rows [num_tokens, hidden], ids and weights [num_tokens, topk] are this rank's.
  const void* rows;
  char* all_rows;  // [R, hidden]
  const void* ids;
  const float* weights;
  char* messages;     // [N]: RailHeader, ids and weights [max_tokens, topk]
  u64 message_bytes;  // of each
  int* all_ids;       // [R, topk], of this node's experts
  float* all_weights;
  // Returned. partials [R, hidden] are this node's sums, returned those of other nodes for this
  // rank's tokens: that of node i for token t is where token t of node i was.
  const __nv_bfloat16 *partials, *returned;
  __nv_bfloat16* out;  // [num_tokens, hidden]
  const float *dweight_partials, *returned_dweight;
  float* out_dweight;     // [num_tokens, topk]
  RailOutcome* outcomes;  // [N]
  // Of what a forward or a plan leaves for later calls, by slice: all are set to 0 if one of this
  // node's slices has failed.
  long long* epochs[kMaxRailSlices];
  int nodes, node, max_tokens, topk, hidden, num_tokens;
  int num_experts;  // of all nodes
  int id_bytes;     // 4 or 8; 0: the call has no tables
  // Several slices: own rows come first, and others in parts (cometrt/nodes/slices.py). One slice:
  // part_tokens is 0.
  int part_tokens, num_epochs;
  // Of one launch. slice: whose call has ended. ends, begins: whether it ends a transfer, and which
  // it begins: 0, or 1 + RailTransfer. own, others: whose tables it turns into those of this node.
  int slice, ends, begins, own, others, unused;

  // As RailSlices.row_of.
  __device__ long long row_of(int of, int token) const {
    if (part_tokens == 0) return 1ll * of * max_tokens + token;
    if (of == node) return token;
    const int part = token / part_tokens;
    const long long slot = 1ll * part * (nodes - 1) + of - (of > node);
    return max_tokens + slot * part_tokens + token - part * part_tokens;
  }
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
