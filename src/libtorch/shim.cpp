// What libtorch exports in C++ and tch leaves out, behind a plain C interface.
//
// Every function returns null on success, or a message allocated with strdup that the caller frees with
// child_tuning_free_message. No C++ exception leaves this file, except through a gradient hook, where libtorch's
// autograd engine expects one and hands it to whoever called backward.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/version.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

template <typename Body>
char *guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error &error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception &error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

// Writes the replacement for `gradient` to `replacement` (null keeps it); both tensors are owned by the callee and
// by this file respectively. Returns a message on failure.
using HookFunction = char *(*)(void *state, at::Tensor *gradient, bool exclusive, at::Tensor **replacement);
using ReleaseFunction = void (*)(void *state);

// The state of one hook. libtorch keeps hooks as copyable std::functions, so the state is shared; the last copy
// releases it.
struct HookState {
  HookState(void *state, ReleaseFunction release) : state(state), release(release) {}
  HookState(const HookState &) = delete;
  HookState &operator=(const HookState &) = delete;
  ~HookState() { release(state); }
  void *state;
  ReleaseFunction release;
};

std::vector<at::Tensor> tensors(at::Tensor *const *pointers, size_t count) {
  std::vector<at::Tensor> list;
  list.reserve(count);
  for (size_t i = 0; i < count; i++) list.push_back(*pointers[i]);
  return list;
}

}  // namespace

extern "C" {

void child_tuning_free_message(char *message) { free(message); }

const char *child_tuning_libtorch_version() { return TORCH_VERSION; }

// Registers a hook on `tensor`. `state` belongs to libtorch from here on, also on failure.
char *child_tuning_register_hook(at::Tensor *tensor, HookFunction function, void *state, ReleaseFunction release,
                                 unsigned *handle) {
  auto shared = std::make_shared<HookState>(state, release);
  return guarded([&] {
    *handle = tensor->register_hook([shared, function](const at::Tensor &gradient) -> at::Tensor {
      // The engine holds this gradient twice while a hook runs (its list and the argument): a third owner, or a
      // second view of the storage, means that somebody else still needs the values.
      const bool exclusive = gradient.use_count() <= 2 && gradient.has_storage() && gradient.storage().use_count() == 1;
      at::Tensor *replacement = nullptr;
      char *message = function(shared->state, new at::Tensor(gradient), exclusive, &replacement);
      std::unique_ptr<at::Tensor> owned(replacement);
      if (message != nullptr) {
        std::string text(message);
        free(message);
        throw std::runtime_error(text);
      }
      return owned ? *owned : at::Tensor();
    });
  });
}

char *child_tuning_remove_hook(at::Tensor *tensor, unsigned handle) {
  return guarded([&] { tensor->remove_hook(handle); });
}

// Makes `gradient` the `.grad` of `leaf`, so that backward adds into that memory.
char *child_tuning_set_gradient(at::Tensor *leaf, at::Tensor *gradient) {
  return guarded([&] { leaf->mutable_grad() = *gradient; });
}

// at::_fused_adamw_ over `count` tensors of one weight-decay group.
char *child_tuning_fused_adamw(at::Tensor *const *parameters, at::Tensor *const *gradients,
                               at::Tensor *const *first_moments, at::Tensor *const *second_moments,
                               at::Tensor *const *steps, size_t count, double learning_rate, double beta1,
                               double beta2, double weight_decay, double epsilon) {
  return guarded([&] {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    at::_fused_adamw_(tensors(parameters, count), tensors(gradients, count), tensors(first_moments, count),
                      tensors(second_moments, count), {}, tensors(steps, count), learning_rate, beta1, beta2,
                      weight_decay, epsilon, /*amsgrad=*/false, /*maximize=*/false);
  });
}

// Largest number of bytes that libtorch has handed out on a CUDA device since the last reset.
char *child_tuning_cuda_peak_bytes(int device, int64_t *bytes) {
  return guarded([&] {
    auto statistics = at::getDeviceAllocator(at::kCUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    *bytes = statistics.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  });
}

char *child_tuning_cuda_reset_peak(int device) {
  return guarded(
      [&] { at::getDeviceAllocator(at::kCUDA)->resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
}

}  // extern "C"
