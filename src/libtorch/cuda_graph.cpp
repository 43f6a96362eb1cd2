// CUDA graphs and streams of libtorch, behind a plain C interface; see shim.cpp for its rules. Without the headers of CUDA
// (CHILD_TUNING_CUDA is not defined) every function fails with one message.

#include "guarded.h"

#ifdef CHILD_TUNING_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <memory>

#define WITH_CUDA(...) guarded([&] { __VA_ARGS__ })
#else
#define WITH_CUDA(...) strdup("this program was built without the headers of CUDA, which CUDA graphs need")
#endif

extern "C" {

// Makes a stream of its own the current one of this thread on a device, once both have done what was asked of them.
char *child_tuning_cuda_use_stream(int device, bool own) {
  return WITH_CUDA({
    const auto index = static_cast<c10::DeviceIndex>(device);
    c10::cuda::device_synchronize();
    const auto stream = own ? c10::cuda::getStreamFromPool(/*isHighPriority=*/false, index)
                            : c10::cuda::getDefaultCUDAStream(index);
    c10::cuda::setCurrentCUDAStream(stream);
  });
}

// Begins to record what this process asks of the current stream, into a new graph. `pool_of` is a graph whose memory this
// one may use again, or null.
char *child_tuning_cuda_graph_begin(void *pool_of, void **graph) {
  return WITH_CUDA({
    auto made = std::make_unique<at::cuda::CUDAGraph>();
    const auto pool = pool_of == nullptr ? at::cuda::MempoolId_t{0, 0}
                                         : static_cast<at::cuda::CUDAGraph *>(pool_of)->pool();
    made->capture_begin(pool);
    *graph = made.release();
  });
}

char *child_tuning_cuda_graph_end(void *graph) {
  return WITH_CUDA(static_cast<at::cuda::CUDAGraph *>(graph)->capture_end(););
}

char *child_tuning_cuda_graph_replay(void *graph) {
  return WITH_CUDA(static_cast<at::cuda::CUDAGraph *>(graph)->replay(););
}

char *child_tuning_cuda_graph_free(void *graph) {
  return WITH_CUDA(delete static_cast<at::cuda::CUDAGraph *>(graph););
}

}  // extern "C"
