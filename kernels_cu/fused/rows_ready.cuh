// The load thread's wait for a tile's rows, in the kernels whose dispatch warps bring them.
#pragma once

#include "fused/dispatch_warp.cuh"
#include "protocol/wait.cuh"

namespace cometrt {

// Acquires tile_filled at gpu scope; its partner is DispatchWarp::release() of the same copy shape.
// kBAhead: the tile's B is loaded while its rows are not there yet.
template <typename Shape, bool kBAhead>
class RowsReady {
 public:
  __device__ RowsReady(const ExchangeParams& params, EventKind kind) : params_(params) {
    recorder_ = Recorder(params.trace(), 1, kind);
  }

  static constexpr bool kLoadsBAhead = kBAhead;

  // Whether wait() would return at once. It acquires nothing.
  __device__ bool is_ready(const WorkTile& tile) const {
    return stopped_ || load_acquire_gpu(&params_.tile_filled[tile.m_tile]) >=
                           tile.rows * Shape::chunks_of_row(params_.g);
  }
  __device__ void wait(const WorkTile& tile) {
    if (stopped_) return;
    const u32* filled = &params_.tile_filled[tile.m_tile];
    recorder_.begin_wait();
    stopped_ = !wait_until(
        params_.world, {kTileFilled, params_.world.rank, tile.m_tile, -1}, params_.world.epoch(),
        tile.rows * Shape::chunks_of_row(params_.g), [&] { return load_acquire_gpu(filled); },
        LATE ? kLatePatience + 1 : 1, [&](u64 begin_ns) { add_wait(begin_ns); });
    recorder_.end_wait(kWaitTileFilled, tile.m_tile, tile.n_tile);
    fence_proxy_async();  // tensor loads read the rows
  }

 private:
  // Not with link emulation, which leaves no register for it in dispatch_down_dgrad.
  __device__ void add_wait([[maybe_unused]] u64 begin_ns) const {
#if !LINK
    atomicAdd(&params_.state->rows_waited_ns, global_timer_ns() - begin_ns);
#endif
  }

  const ExchangeParams& params_;
  bool stopped_ = false;  // the world has stopped: no more waits, since the results become NaN
  Recorder recorder_;
};

}  // namespace cometrt
