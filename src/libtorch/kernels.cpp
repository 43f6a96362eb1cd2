// Runs the kernels of kernels.cu: on a GPU, for which they are compiled when it is first used, or thread by thread on the CPU.
//
// The compiler is NVRTC, which every build of libtorch for CUDA brings along, with the driver's interface beside it. Both are
// asked for by name, so that nothing needs CUDA's headers, nor a GPU where none is used.

#include "guarded.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

// As in CUDA's headers: handles are pointers, codes numbers of which zero is success.
struct Compiler {
  int (*version)(int *major, int *minor);
  int (*create)(void **program, const char *source, const char *name, int headers, const char *const *, const char *const *);
  int (*compile)(void *program, int count, const char *const *options);
  int (*log_size)(void *program, size_t *size);
  int (*log)(void *program, char *log);
  int (*binary_size)(void *program, size_t *size);
  int (*binary)(void *program, char *binary);
  int (*destroy)(void **program);
  const char *(*error)(int code);
};

struct Driver {
  int (*device)(int *device, int index);
  int (*retain_context)(void **context, int device);
  int (*context)(void **context);
  int (*set_context)(void *context);
  int (*attribute)(int *value, int attribute, int device);
  int (*load)(void **module, const void *image);
  int (*function)(void **function, void *module, const char *name);
  int (*launch)(void *function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared, void *stream,
                void **arguments, void **extra);
  int (*error)(int code, const char **message);
};

Compiler compiler;
Driver driver;

template <typename Function>
void find(void *library, const char *name, Function &function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  TORCH_CHECK(function != nullptr, "NVRTC or the driver has no ", name);
}

void load_libraries() {
  // The one through which libtorch compiles kernels of its own.
  void *library = dlopen("libcaffe2_nvrtc.so", RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "the compiler of kernels is missing: ", dlerror());
  find(library, "nvrtcVersion", compiler.version);
  find(library, "nvrtcCreateProgram", compiler.create);
  find(library, "nvrtcCompileProgram", compiler.compile);
  find(library, "nvrtcGetProgramLogSize", compiler.log_size);
  find(library, "nvrtcGetProgramLog", compiler.log);
  find(library, "nvrtcGetCUBINSize", compiler.binary_size);
  find(library, "nvrtcGetCUBIN", compiler.binary);
  find(library, "nvrtcDestroyProgram", compiler.destroy);
  find(library, "nvrtcGetErrorString", compiler.error);
  find(library, "cuDeviceGet", driver.device);
  find(library, "cuDevicePrimaryCtxRetain", driver.retain_context);
  find(library, "cuCtxGetCurrent", driver.context);
  find(library, "cuCtxSetCurrent", driver.set_context);
  find(library, "cuDeviceGetAttribute", driver.attribute);
  find(library, "cuModuleLoadData", driver.load);
  find(library, "cuModuleGetFunction", driver.function);
  find(library, "cuLaunchKernel", driver.launch);
  find(library, "cuGetErrorString", driver.error);

  // NVRTC asks for a library of its own by name, where nobody looks if it stands in a Python package: beside NVRTC.
  int major = 0, minor = 0;
  Dl_info info;
  if (compiler.version(&major, &minor) != 0 || dladdr(reinterpret_cast<void *>(compiler.create), &info) == 0) return;
  const std::string path(info.dli_fname), folder = path.substr(0, path.rfind('/') + 1);
  const std::string beside = folder + "libnvrtc-builtins.so." + std::to_string(major) + "." + std::to_string(minor);
  // Where it is not, NVRTC says so if it misses it.
  dlopen(beside.c_str(), RTLD_NOW | RTLD_LOCAL);
}

void compiled(int code, const char *what) { TORCH_CHECK(code == 0, what, ": ", compiler.error(code)); }

void driven(int code, const char *what) {
  if (code == 0) return;
  const char *message = nullptr;
  driver.error(code, &message);
  TORCH_CHECK(false, what, ": CUDA error: ", message == nullptr ? "unknown" : message);
}

// Compiles the kernels for a device.
std::vector<char> compile(int device, const char *source) {
  int major, minor;
  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
  driven(driver.attribute(&major, 75, device), "the GPU's capability");
  driven(driver.attribute(&minor, 76, device), "the GPU's capability");
  const std::string architecture = "--gpu-architecture=sm_" + std::to_string(major) + std::to_string(minor);
  const char *options[] = {architecture.c_str(), "--fmad=false", "--std=c++17"};
  void *program = nullptr;
  compiled(compiler.create(&program, source, "kernels.cu", 0, nullptr, nullptr), "kernels");
  const int outcome = compiler.compile(program, 3, options);
  std::string log;
  size_t size = 0;
  if (outcome != 0 && compiler.log_size(program, &size) == 0) {
    log.resize(size);
    compiler.log(program, log.data());
  }
  TORCH_CHECK(outcome == 0, "kernels for ", architecture, ": ", compiler.error(outcome), "\n", log);
  compiled(compiler.binary_size(program, &size), "kernels");
  std::vector<char> binary(size);
  compiled(compiler.binary(program, binary.data()), "kernels");
  compiler.destroy(&program);
  return binary;
}

// Returns a kernel of the GPU with a number, whose context is this thread's from here on.
void *kernel(int index, const char *source, const char *name) {
  static std::mutex mutex;
  static bool loaded = false;
  static std::map<int, void *> modules;
  static std::map<std::pair<int, std::string>, void *> kernels;
  std::lock_guard<std::mutex> lock(mutex);
  if (!loaded) {
    load_libraries();
    loaded = true;
  }
  // libtorch's own, which a thread gets by its first call of the runtime only.
  void *context = nullptr;
  int device = 0;
  driven(driver.context(&context), "the GPU's context");
  driven(driver.device(&device, index), "the GPU");
  if (context == nullptr) {
    driven(driver.retain_context(&context, device), "the GPU's context");
    driven(driver.set_context(context), "the GPU's context");
  }
  if (modules.find(index) == modules.end()) {
    void *module = nullptr;
    const std::vector<char> binary = compile(device, source);
    driven(driver.load(&module, binary.data()), "loading kernels");
    modules[index] = module;
  }
  auto found = kernels.find({index, name});
  if (found == kernels.end()) {
    void *function = nullptr;
    driven(driver.function(&function, modules[index], name), name);
    found = kernels.emplace(std::make_pair(index, std::string(name)), function).first;
  }
  return found->second;
}

namespace on_cpu {

struct Number {
  unsigned x;
};
thread_local Number threadIdx, blockIdx, blockDim, gridDim;

#define __device__
#define __global__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#include "kernels.cu"
#include "rows.cu"

template <typename Arguments>
void run(void (*kernel)(Arguments), unsigned blocks, unsigned threads, const void *arguments) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) kernel(*static_cast<const Arguments *>(arguments));
}

}  // namespace on_cpu

}  // namespace

extern "C" {

// Starts a kernel on a GPU, in the order of what the current stream does; with a `device` below zero it runs on the CPU, and
// has ended when this returns. `arguments` is the kernel's one argument.
char *child_tuning_launch(int device, const char *source, const char *name, unsigned blocks, unsigned threads,
                          void *arguments) {
  return guarded([&] {
    if (device < 0) {
      const std::string wanted(name);
      if (wanted == "update") return on_cpu::run(on_cpu::update, blocks, threads, arguments);
      if (wanted == "squares") return on_cpu::run(on_cpu::squares, blocks, threads, arguments);
      if (wanted == "mask") return on_cpu::run(on_cpu::mask, blocks, threads, arguments);
      if (wanted == "collect") return on_cpu::run(on_cpu::collect, blocks, threads, arguments);
      if (wanted == "lay_out") return on_cpu::run(on_cpu::lay_out, blocks, threads, arguments);
      if (wanted == "part_sums") return on_cpu::run(on_cpu::part_sums, blocks, threads, arguments);
      if (wanted == "part_squares") return on_cpu::run(on_cpu::part_squares, blocks, threads, arguments);
      if (wanted == "columns") return on_cpu::run(on_cpu::columns, blocks, threads, arguments);
      if (wanted == "totals") return on_cpu::run(on_cpu::totals, blocks, 1, arguments);
      if (wanted == "drop") return on_cpu::run(on_cpu::drop, blocks, threads, arguments);
      if (wanted == "add_and_norm") return on_cpu::run(on_cpu::add_and_norm, blocks, 1, arguments);
      if (wanted == "add_and_norm_backward") return on_cpu::run(on_cpu::add_and_norm_backward, blocks, 1, arguments);
      if (wanted == "entries_of_chunks") return on_cpu::run(on_cpu::entries_of_chunks, blocks, 1, arguments);
      if (wanted == "entries_of_parts") return on_cpu::run(on_cpu::entries_of_parts, blocks, 1, arguments);
      if (wanted == "entries_of_table") return on_cpu::run(on_cpu::entries_of_table, blocks, 1, arguments);
      if (wanted == "gelu_backward") return on_cpu::run(on_cpu::gelu_backward, blocks, threads, arguments);
      TORCH_CHECK(false, "there is no kernel ", wanted);
    }
    const at::Device gpu(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    const c10::DeviceGuard guard(gpu);
    void *stream = c10::impl::VirtualGuardImpl(at::kCUDA).getStream(gpu).native_handle();
    // First, since it finds the driver.
    void *function = kernel(device, source, name);
    driven(driver.launch(function, blocks, 1, 1, threads, 1, 1, 0, stream, &arguments, nullptr), name);
  });
}

}  // extern "C"
