// What libtorch exports in C++ and tch leaves out, behind a plain C interface.
//
// Every function returns null on success, or a message allocated with strdup that the caller frees with
// child_tuning_free_message. No C++ exception leaves this file, except through a gradient hook, where libtorch's
// autograd engine expects one and hands it to whoever called backward.

#include "guarded.h"

#include <ATen/Context.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/pin_memory.h>
#include <ATen/ops/to.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <kineto/ActivityType.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/version.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

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

// Takes the gradient out of a leaf as soon as backward has put it there; libtorch calls it, too, where none has come.
struct TakeGradient : torch::autograd::PostAccumulateGradHook {
  explicit TakeGradient(std::shared_ptr<HookState> state) : state(std::move(state)) {}

  void operator()(const torch::autograd::Variable &leaf) override {
    at::Tensor gradient = std::move(leaf.mutable_grad());
    leaf.mutable_grad().reset();
    if (gradient.defined()) state->call(std::move(gradient));
  }

  std::shared_ptr<HookState> state;
};

// Computes the gradients of an operation's inputs, as many as it has, from those of its outputs, which it takes over.
// Returns a message on failure.
using BackwardFunction = char *(*)(void *state, at::Tensor *const *gradients, size_t count, at::Tensor **results);

// The backward of an operation of our own.
struct OwnBackward : torch::autograd::Node {
  OwnBackward(BackwardFunction function, void *state, ReleaseFunction release)
      : function(function), state(state, release) {}

  torch::autograd::variable_list apply(torch::autograd::variable_list &&gradients) override {
    torch::autograd::variable_list results(num_outputs());
    const auto defined = [](const at::Tensor &gradient) { return gradient.defined(); };
    if (std::none_of(gradients.begin(), gradients.end(), defined)) return results;
    TORCH_CHECK(state != nullptr, "backward has gone through this operation before and has freed what it needs");
    at::NoGradGuard no_grad;
    std::vector<at::Tensor *> own, pointers(results.size(), nullptr);
    for (size_t i = 0; i < gradients.size(); i++)
      own.push_back(new at::Tensor(gradients[i].defined() ? std::move(gradients[i]) : input_metadata(i).zeros_like()));
    char *message = function(state.get(), own.data(), own.size(), pointers.data());
    for (size_t i = 0; i < pointers.size(); i++) {
      std::unique_ptr<at::Tensor> owned(pointers[i]);
      if (owned != nullptr) results[i] = *owned;
    }
    if (message == nullptr) return results;
    std::string text(message);
    free(message);
    throw std::runtime_error(text);
  }

  void release_variables() override { state.reset(); }

  BackwardFunction function;
  std::unique_ptr<void, ReleaseFunction> state;
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

char *child_tuning_seed(uint64_t seed) {
  return guarded([&] { at::manual_seed(seed); });
}

char *child_tuning_synchronize(int device) {
  return guarded([&] {
    TORCH_CHECK(device >= 0 && device < at::detail::getCUDAHooks().deviceCount(), "there is no CUDA device ", device);
    at::detail::getCUDAHooks().deviceSynchronize(static_cast<c10::DeviceIndex>(device));
  });
}

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

// Makes the outputs the results of an operation on the inputs, if a gradient is asked for. `state` belongs to this file
// from here on, also on failure.
char *child_tuning_own_backward(at::Tensor *const *outputs, size_t output_count, at::Tensor *const *inputs,
                                size_t input_count, BackwardFunction function, void *state, ReleaseFunction release) {
  std::shared_ptr<OwnBackward> node(new OwnBackward(function, state, release), torch::autograd::deleteNode);
  return guarded([&] {
    const auto list = tensors(inputs, input_count);
    if (!at::GradMode::is_enabled() || !torch::autograd::any_variable_requires_grad(list)) return;
    node->set_next_edges(torch::autograd::collect_next_edges(list));
    torch::autograd::set_history(tensors(outputs, output_count), node);
  });
}

// Whether the one handle of a tensor that is alive is that of whoever asks, and its memory no other tensor's.
bool child_tuning_is_exclusive(const at::Tensor *tensor) {
  return tensor->defined() && tensor->use_count() == 1 && tensor->has_storage() && tensor->storage().use_count() == 1;
}

// mkldnn::_linear_pointwise with nothing fused to it: input . weight^T + bias in oneDNN, without a graph; a null bias is none.
char *child_tuning_onednn_linear(at::Tensor *input, at::Tensor *weight, at::Tensor *bias, at::Tensor **output) {
  using Linear = at::Tensor(const at::Tensor &, const at::Tensor &, const std::optional<at::Tensor> &, std::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  return guarded([&] {
    static const auto linear =
        c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Linear>();
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    const auto added = bias == nullptr ? std::nullopt : std::make_optional(*bias);
    const c10::List<std::optional<at::Scalar>> no_scalars;
    *output = new at::Tensor(linear.call(*input, *weight, added, "none", no_scalars, ""));
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

// ---- Measuring: what ran, how often, how long; what memory there is ----

namespace {

namespace profiler = torch::autograd::profiler;
using Activity = torch::profiler::impl::ActivityType;

// What one name adds up to.
struct ProfileSum {
  uint64_t calls = 0;
  uint64_t total = 0;
  uint64_t own = 0;
};

// An operator call that has begun and whose inner calls are still to come.
struct OpenCall {
  const profiler::KinetoEvent *event;
  uint64_t inner;
};

bool is_on_device(const profiler::KinetoEvent &event) {
  const auto kind = static_cast<libkineto::ActivityType>(event.activityType());
  return event.deviceType() != at::kCPU &&
         (kind == libkineto::ActivityType::CONCURRENT_KERNEL || kind == libkineto::ActivityType::GPU_MEMCPY ||
          kind == libkineto::ActivityType::GPU_MEMSET);
}

bool is_operator(const profiler::KinetoEvent &event) {
  return event.deviceType() == at::kCPU &&
         static_cast<libkineto::ActivityType>(event.activityType()) == libkineto::ActivityType::CPU_OP;
}

// Sums operator calls by name. An inner call's time is part of its caller's total, not of its caller's own time.
std::map<std::string, ProfileSum> sum_operators(const std::vector<profiler::KinetoEvent> &events) {
  std::map<uint64_t, std::vector<const profiler::KinetoEvent *>> by_thread;
  for (const auto &event : events) {
    if (is_operator(event)) by_thread[event.startThreadId()].push_back(&event);
  }
  std::map<std::string, ProfileSum> sums;
  const auto close = [&sums](const OpenCall &call) {
    ProfileSum &sum = sums[call.event->name()];
    const uint64_t duration = call.event->durationNs();
    sum.calls += 1;
    sum.total += duration;
    sum.own += duration - std::min(call.inner, duration);
  };
  for (auto &[thread, calls] : by_thread) {
    // Callers before their inner calls.
    std::stable_sort(calls.begin(), calls.end(), [](const auto *left, const auto *right) {
      return left->startNs() != right->startNs() ? left->startNs() < right->startNs() : left->endNs() > right->endNs();
    });
    std::vector<OpenCall> open;
    for (const auto *event : calls) {
      while (!open.empty() && open.back().event->endNs() <= event->startNs()) {
        close(open.back());
        open.pop_back();
      }
      if (!open.empty()) open.back().inner += event->durationNs();
      open.push_back({event, 0});
    }
    for (; !open.empty(); open.pop_back()) close(open.back());
  }
  return sums;
}

}  // namespace

extern "C" {

// Starts to record operator calls of this thread and of the backward passes it starts, and kernels where there is a GPU.
char *child_tuning_profile_start() {
  return guarded([&] {
    std::set<Activity> activities{Activity::CPU};
    if (at::hasCUDA()) activities.insert(Activity::CUDA);
    const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
    profiler::prepareProfiler(config, activities);
    profiler::enableProfiler(config, activities);
  });
}

// Ends the recording of this thread. `row` is called once a name, for what ran on the host and on a GPU; times in ns.
// Whoever calls has waited for the GPU.
char *child_tuning_profile_stop(void *state,
                                void (*row)(void *state, const char *name, bool on_device, uint64_t calls,
                                            uint64_t total, uint64_t own)) {
  return guarded([&] {
    const auto result = profiler::disableProfiler();
    for (const auto &[name, sum] : sum_operators(result->events())) {
      row(state, name.c_str(), false, sum.calls, sum.total, sum.own);
    }
    std::map<std::string, ProfileSum> kernels;
    for (const auto &event : result->events()) {
      if (!is_on_device(event)) continue;
      ProfileSum &sum = kernels[event.name()];
      sum.calls += 1;
      sum.total += event.durationNs();
    }
    for (const auto &[name, sum] : kernels) row(state, name.c_str(), true, sum.calls, sum.total, sum.total);
  });
}

// Bytes that a CUDA device has free for anybody, and all its bytes.
char *child_tuning_device_memory(int device, uint64_t *free_bytes, uint64_t *total_bytes) {
  return guarded([&] {
    TORCH_CHECK(at::hasCUDA(), "there is no CUDA device");
    // The allocator is made by the first use of CUDA.
    at::globalContext().lazyInitDevice(at::kCUDA);
    const auto memory = at::getDeviceAllocator(at::kCUDA)->getMemoryInfo(static_cast<c10::DeviceIndex>(device));
    *free_bytes = memory.first;
    *total_bytes = memory.second;
  });
}

// Makes a CUDA device the one that what names none goes to, such as pinned memory.
char *child_tuning_use_device(int device) {
  return guarded([&] {
    TORCH_CHECK(at::hasCUDA(), "there is no CUDA device");
    at::globalContext().lazyInitDevice(at::kCUDA);
    c10::impl::VirtualGuardImpl(at::kCUDA).setDevice(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
  });
}

// Gives memory that libtorch keeps for later back to the CUDA devices; nothing where CUDA was never used. All work on
// `device` is done before.
char *child_tuning_release_cached_memory(int device) {
  return guarded([&] {
    if (!at::hasCUDA()) return;
    auto *allocator = at::getDeviceAllocator(at::kCUDA);
    if (!allocator->initialized()) return;
    // Where segments grow, the allocator of libtorch 2.11 waits for the current device only before it takes memory away
    // (pytorch/pytorch#196258).
    const auto index = static_cast<c10::DeviceIndex>(device);
    const c10::DeviceGuard guard(at::Device(at::kCUDA, index));
    at::detail::getCUDAHooks().deviceSynchronize(index);
    allocator->emptyCache();
  });
}


// ---- Computing on a GPU: attention without padding, TF32, uploads that nobody waits for ----

// softmax(q kᵀ · scale) v within each example; q and the result are [queries, heads, head_size], k and v
// [tokens, heads, head_size]. `query_counts` and `token_counts` count those before each example, int32 [examples + 1], and
// `most_queries` and `most_tokens` those of the largest. With a `window` from zero on, each token attends to no token
// further away than that; to all with a negative one. Has a gradient.
char *child_tuning_flash_attention(at::Tensor *query, at::Tensor *key, at::Tensor *value, at::Tensor *query_counts,
                                   at::Tensor *token_counts, int64_t most_queries, int64_t most_tokens,
                                   int64_t window, double dropout, double scale, at::Tensor **context) {
  return guarded([&] {
    const auto side = window < 0 ? std::nullopt : std::make_optional(window);
    auto result = at::_flash_attention_forward(*query, *key, *value, *query_counts, *token_counts, most_queries,
                                               most_tokens, dropout, /*is_causal=*/false,
                                               /*return_debug_mask=*/false, scale, side, side);
    *context = new at::Tensor(std::get<0>(std::move(result)));
  });
}

// Says whether products of float32 matrices on CUDA may use TF32 from here on, and whether they might before.
char *child_tuning_allow_tf32(bool allowed, bool *before) {
  return guarded([&] {
    *before = at::globalContext().allowTF32CuBLAS();
    if (*before != allowed) at::globalContext().setAllowTF32CuBLAS(allowed);
  });
}

// Copies a tensor of the CPU to a CUDA device, in the order of its work and without waiting for it. The copy reads
// pinned memory, which libtorch does not hand out again before the device has read it.
char *child_tuning_upload(at::Tensor *host, int device, at::Tensor **copy) {
  return guarded([&] {
    const at::Device target(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    *copy = new at::Tensor(host->pin_memory().to(target, host->scalar_type(), /*non_blocking=*/true));
  });
}

}  // extern "C"
