// CUDA graphs and streams of libtorch, behind a plain C interface; see shim.cpp for its rules. Without the headers of CUDA
// (CHILD_TUNING_CUDA is not defined) every function fails with one message.

#include "guarded.h"

#ifdef CHILD_TUNING_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <memory>
#include <mutex>

// The stream of a device that graphs are recorded on, always the same one: what the allocator and cuBLAS keep belongs to a
// stream.
static c10::cuda::CUDAStream recording_stream(c10::DeviceIndex index) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, c10::cuda::CUDAStream> streams;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = streams.find(index);
  if (found == streams.end()) {
    found = streams.emplace(index, c10::cuda::getStreamFromPool(/*isHighPriority=*/false, index)).first;
  }
  return found->second;
}

// Memory of a graph is of a pool that is known from the start, so that it can be closed where a recording fails.
struct Recording {
  at::cuda::CUDAGraph graph;
  at::cuda::MempoolId_t pool;
  c10::DeviceIndex device;
};

// Makes a device usable after a recording that failed. libtorch ends its part of one only if CUDA did: it would go on to give
// all memory out of the graph's pool, and the generator would refuse to draw.
static void clean_up_after(const Recording &recording) {
  try {
    c10::cuda::CUDACachingAllocator::endAllocateToPool(recording.device, recording.pool);
  } catch (...) {
    // It has ended.
  }
  try {
    // Of pinned memory, too.
    at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(recording.pool);
  } catch (...) {
    // It has ended.
  }
  auto fresh = at::cuda::detail::createCUDAGenerator(recording.device);
  auto generator = at::cuda::detail::getDefaultCUDAGenerator(recording.device);
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.graphsafe_set_state(fresh);
}

#define WITH_CUDA(...) guarded([&] { __VA_ARGS__ })
#else
#define WITH_CUDA(...) strdup("this program was built without the headers of CUDA, which CUDA graphs need")
#endif

extern "C" {

// Makes a device the current one of this thread, and a stream of its own the current one there, once all has been done that
// was asked of the device.
char *child_tuning_cuda_use_stream(int device, bool own) {
  return WITH_CUDA({
    const auto index = static_cast<c10::DeviceIndex>(device);
    // A recording is of the current device.
    c10::cuda::set_device(index);
    c10::cuda::device_synchronize();
    c10::cuda::setCurrentCUDAStream(own ? recording_stream(index) : c10::cuda::getDefaultCUDAStream(index));
  });
}

// Begins to record what this process asks of the current stream, into a new graph. `pool_of` is a graph whose memory this
// one may use again, or null.
char *child_tuning_cuda_graph_begin(void *pool_of, void **graph) {
  return WITH_CUDA({
    auto *recording = new Recording;
    recording->pool = pool_of == nullptr ? at::cuda::graph_pool_handle() : static_cast<Recording *>(pool_of)->pool;
    recording->device = c10::cuda::current_device();
    try {
      recording->graph.capture_begin(recording->pool);
    } catch (...) {
      // The graph is not freed: the allocator may still ask it whose memory is whose.
      clean_up_after(*recording);
      throw;
    }
    *graph = recording;
  });
}

// Where this fails, the graph must not be freed: the allocator may still ask it whose memory is whose.
char *child_tuning_cuda_graph_end(void *graph) {
  return WITH_CUDA({
    auto *recording = static_cast<Recording *>(graph);
    try {
      recording->graph.capture_end();
    } catch (...) {
      clean_up_after(*recording);
      throw;
    }
  });
}

char *child_tuning_cuda_graph_replay(void *graph) {
  return WITH_CUDA(static_cast<Recording *>(graph)->graph.replay(););
}

char *child_tuning_cuda_graph_free(void *graph) {
  return WITH_CUDA(delete static_cast<Recording *>(graph););
}

}  // extern "C"
