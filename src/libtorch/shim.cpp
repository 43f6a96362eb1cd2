// What libtorch exports in C++ and tch leaves out, behind a plain C interface.
//
// Every function returns null on success, or a message allocated with strdup that the caller frees with
// child_tuning_free_message. No C++ exception leaves this file, except through a gradient hook, where libtorch's
// autograd engine expects one and hands it to whoever called backward.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/autograd/function_hook.h>
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

// Takes `gradient` over. Returns a message on failure.
using HookFunction = char *(*)(void *state, at::Tensor *gradient);
using ReleaseFunction = void (*)(void *state);

// The state of one hook. libtorch keeps hooks as copyable std::functions, so the state is shared; the last copy
// releases it.
struct HookState {
  HookState(HookFunction function, void *state, ReleaseFunction release)
      : function(function), state(state), release(release) {}
  HookState(const HookState &) = delete;
  HookState &operator=(const HookState &) = delete;
  ~HookState() { release(state); }

  void call(at::Tensor gradient) const {
    char *message = function(state, new at::Tensor(std::move(gradient)));
    if (message == nullptr) return;
    std::string text(message);
    free(message);
    throw std::runtime_error(text);
  }

  HookFunction function;
  void *state;
  ReleaseFunction release;
};

// Takes the gradient out of a leaf as soon as backward has put it there.
struct TakeGradient : torch::autograd::PostAccumulateGradHook {
  explicit TakeGradient(std::shared_ptr<HookState> state) : state(std::move(state)) {}

  void operator()(const torch::autograd::Variable &leaf) override {
    at::Tensor gradient = std::move(leaf.mutable_grad());
    leaf.mutable_grad().reset();
    state->call(std::move(gradient));
  }

  std::shared_ptr<HookState> state;
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

// Registers a hook that sees the gradient of `tensor` on its way. `state` belongs to libtorch from here on, also on
// failure.
char *child_tuning_register_hook(at::Tensor *tensor, HookFunction function, void *state, ReleaseFunction release,
                                 unsigned *handle) {
  auto shared = std::make_shared<HookState>(function, state, release);
  return guarded([&] {
    *handle = tensor->register_hook([shared](const at::Tensor &gradient) -> at::Tensor {
      shared->call(gradient);
      return at::Tensor();
    });
  });
}

char *child_tuning_remove_hook(at::Tensor *tensor, unsigned handle) {
  return guarded([&] { tensor->remove_hook(handle); });
}

// Registers the one hook that takes each gradient that backward leaves in the leaf `leaf`. `state` belongs to libtorch
// from here on, also on failure.
char *child_tuning_take_gradients(at::Tensor *leaf, HookFunction function, void *state, ReleaseFunction release) {
  auto shared = std::make_shared<HookState>(function, state, release);
  return guarded([&] {
    TORCH_CHECK(leaf->requires_grad() && leaf->is_leaf(), "only a leaf that requires a gradient keeps one to take");
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf, std::make_unique<TakeGradient>(shared));
  });
}

char *child_tuning_leave_gradients(at::Tensor *leaf) {
  return guarded([&] { torch::autograd::impl::set_post_acc_grad_hooks(*leaf, nullptr); });
}

// at::_fused_adamw_ over `count` tensors of one weight-decay group. The kernel divides the gradients by `divisor`, a
// scalar on their device; null leaves them.
char *child_tuning_fused_adamw(at::Tensor *const *parameters, at::Tensor *const *gradients,
                               at::Tensor *const *first_moments, at::Tensor *const *second_moments,
                               at::Tensor *const *steps, size_t count, double learning_rate, double beta1,
                               double beta2, double weight_decay, double epsilon, at::Tensor *divisor) {
  return guarded([&] {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    const auto gradient_divisor = divisor == nullptr ? std::nullopt : std::make_optional(*divisor);
    at::_fused_adamw_(tensors(parameters, count), tensors(gradients, count), tensors(first_moments, count),
                      tensors(second_moments, count), {}, tensors(steps, count), learning_rate, beta1, beta2,
                      weight_decay, epsilon, /*amsgrad=*/false, /*maximize=*/false, gradient_divisor);
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
