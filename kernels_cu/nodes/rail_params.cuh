// Parameters of the kernels around a rail: what crosses between nodes, before and after a call of a
// node's layer. NCCL moves the messages; these kernels pack, check and add them. Mirrored in
// cometrt/kernels/params.py.
#pragma once

#include <cuda_bf16.h>

#include "protocol/exchange_params.cuh"

namespace cometrt {

// MAX_RAIL_SLICES of cometrt/plan/config.py.
constexpr int kMaxRailSlices = 16;

// PART_UNITS of cometrt/node_specs.py: the last late part has that share of the tokens of another.
constexpr int kPartUnits = 3;

// Transfers of a call, by what crosses. RailParams::begins is one more.
enum RailTransfer : u64 { kTokensCross, kPartialsCross };

// The beginning of a message: what a rank says of its call. All ranks of a rail must agree.
// epoch: of the node's call; nodes may count differently.
struct RailHeader {
  long long operation, layer, spec_hash, forward, epoch, unused[3];
};

// Also has ids [C, topk] and weights [C, topk] behind it.
struct RailMessage {
  char* begin;

  __device__ RailHeader& header() const { return *reinterpret_cast<RailHeader*>(begin); }
  __device__ int* ids() const { return reinterpret_cast<int*>(begin + sizeof(RailHeader)); }
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
// those of all tokens of the rail, at row_of. Some rows may belong to no token. C: `crossing`.
struct RailParams {
  World world;  // of the node
  // forward: the number of a backward's forward, or of a planned forward's plan, as hosts count
  // them. Epochs may differ between nodes: a call that does nothing on one of them counts none
  // there.
  long long operation, layer, spec_hash, forward;
  const ExchangeState* state;
  const PlanProgress* progress;  // of a call that makes a plan
  RailReport* report;
  // Late parts: the inner call's ExchangeParams::part_sums [num_parts + 1].
  u32* part_sums;
  // [4] in the host's memory. 0: the newest transfer that has begun, 2 * number + RailTransfer.
  // 1: the newest that has ended. 2: of the call whose plan failed, layer * 256 + slice + 1, until
  // the host has raised its error. 3: the epoch of a call that other ranks of the rail do not make.
  u64* steps;
  // Gathered. rows [num_tokens, hidden], ids and weights [num_tokens, topk] are this rank's.
  const void* rows;
  char* all_rows;  // [R, hidden]
  const void* ids;
  const float* weights;
  char* messages;     // [N]: RailHeader, ids and weights [C, topk]
  u64 message_bytes;  // of each
  int* all_ids;       // [R, topk], of this node's experts
  float* all_weights;
  // Where only wanted tokens cross: else null, and slots are tokens. slots [N, max_tokens]: of this
  // rank's tokens on the other nodes, or -1 (cometrt/nodes/crossing.py). counts [N]: tokens that a
  // node wants; of this node, the first pair that breaks a rule. wanted_rows [num_tokens, hidden]
  // are this rank's, of which those with slots are copied to crossing_rows [N - 1, C, hidden];
  // outgoing [N]: messages, whose ids are the node's.
  int* slots;
  int* counts;
  const char* wanted_rows;
  char* crossing_rows;
  char* outgoing;
  // Returned. partials [R, hidden] are this node's sums, returned those of other nodes for this
  // rank's tokens: that of node i for token t is where the token in the same slot of node i was.
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
  // Several slices: own rows come first, and others in parts (cometrt/nodes/slices.py). Late parts:
  // they come in front of own rows. Else part_tokens is 0.
  int part_tokens, num_epochs;
  // Of one launch. slice: whose call has ended. ends, begins: whether it ends a transfer, and which
  // it begins: 0, or 1 + RailTransfer. own, others: whose tables it turns into those of this node.
  int slice, ends, begins, own, others;
  int crossing;  // tokens of each other rank of the rail for which there are rows
  // num_parts: late parts. local_experts: experts of a rank. part: which one a launch is about.
  int num_parts, local_experts, part, unused;

  // As RailSlices.row_of.
  __device__ long long row_of(int of, int slot) const {
    if (part_tokens == 0) {
      return 1ll * of * crossing + (of > node ? max_tokens - crossing : 0) + slot;
    }
    const long long part_rows = 1ll * (nodes - 1) * part_tokens;
    if (of == node) return num_parts > 0 ? late_rows() + slot : slot;
    const int part = slot / part_tokens;
    const long long row = 1ll * (of - (of > node)) * tokens_of(part) + slot - part * part_tokens;
    return (num_parts > 0 ? 0 : max_tokens) + part * part_rows + row;
  }
  // A home's rows of a late part; num_parts: of its own tokens.
  __device__ int rows_of(int part) const {
    return part == num_parts ? max_tokens : (nodes - 1) * tokens_of(part);
  }
  // Rows of another node in a part, and with late parts of all other nodes in all parts.
  __device__ int tokens_of(int part) const {
    return num_parts > 0 && part == num_parts - 1 ? part_tokens / kPartUnits : part_tokens;
  }
  __device__ long long late_rows() const {
    return 1ll * (nodes - 1) * ((num_parts - 1) * part_tokens + tokens_of(num_parts - 1));
  }
  // The plan expert of an expert of this node, for the row set of a rank's slot. Ids that are no
  // expert's stay as they are.
  __device__ int plan_expert(int id, int of, int slot) const {
    if (num_parts == 0 || id < 0) return id;
    const int set = of == node ? 0 : 1 + slot / part_tokens;
    return (id / local_experts * (num_parts + 1) + set) * local_experts + id % local_experts;
  }
  // Of this rank's token on another node.
  __device__ int slot_of(int of, int token) const {
    return slots == nullptr ? token : slots[1ll * of * max_tokens + token];
  }
  __device__ RailMessage message(int of) const { return {messages + of * message_bytes}; }
  // To a node.
  __device__ RailMessage outgoing_message(int to) const { return {outgoing + to * message_bytes}; }
  __device__ float* weights_of(const RailMessage& message) const {
    return reinterpret_cast<float*>(message.ids() + 1ll * crossing * topk);
  }
};

}  // namespace cometrt
