"""The tool chain on a GPU: NVRTC's code for sm_90a loads and runs, through our compiler."""

import numpy as np
import pytest

from cometrt.kernels.compiler import compile_cubin

pytestmark = pytest.mark.gpu

SOURCE = """
#include <cuda_bf16.h>
#include "hopper/memory.cuh"
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#error "not compiled for sm_90a"
#endif
extern "C" __global__ void scale(__nv_bfloat16* x, int count, int* done) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) x[i] = __float2bfloat16(SCALE * __bfloat162float(x[i]));
  __syncthreads();
  if (threadIdx.x == 0) cometrt::add_release_gpu(reinterpret_cast<unsigned*>(done), 1);
}
"""


def test_a_compiled_kernel_loads_and_runs(tmp_path, monkeypatch):
    cp = pytest.importorskip("cupy")
    import ml_dtypes

    monkeypatch.setenv("COMETRT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "scale.cu").write_text(SOURCE)
    cubin = compile_cubin(tmp_path / "scale.cu", (("SCALE", 3),))
    assert cubin.resources["scale"].spill_bytes == 0
    kernel = cp.RawModule(path=str(cubin.path)).get_function("scale")
    x = cp.arange(1000).astype(ml_dtypes.bfloat16)
    done = cp.zeros(1, cp.int32)
    kernel((8,), (128,), (x, np.int32(1000), done))
    expected = 3 * np.arange(1000).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(
        x.get().astype(np.float32), expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    assert int(done[0]) == 8
