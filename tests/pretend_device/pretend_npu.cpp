// A pretend accelerator for tests, registered as PyTorch's PrivateUse1 device. It differs from a CPU where a real device does:
//  - Device memory is host memory behind tagged pointers: host code that follows one crashes.
//  - An operator runs on the host, but only if all its tensors are on one device.
//  - A copy from pinned memory that need not block is deferred: the source must stay unchanged until the copy was waited for.
//  - Memory is limited per device and counted over all processes that share the file PRETEND_NPU_MEMORY.
// PRETEND_NPU_DEVICES: number of visible devices (default 4). PRETEND_NPU_FIRST: the host's number of the first (default 0).
// PRETEND_NPU_BYTES: memory of each (default 8 GiB).

#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr uint64_t kTag = 1ull << 62;
constexpr int kMaxDevices = 16, kMaxProcesses = 64;
constexpr size_t kLine = 64;

int64_t read_number(const char* name, int64_t otherwise) {
  const char* text = getenv(name);
  return text ? atoll(text) : otherwise;
}

int count_hidden() { return static_cast<int>(read_number("PRETEND_NPU_FIRST", 0)); }

int count_devices() { return static_cast<int>(std::min<int64_t>(read_number("PRETEND_NPU_DEVICES", 4), kMaxDevices - count_hidden())); }

thread_local c10::DeviceIndex current_device = 0;

void* tag(void* address) { return reinterpret_cast<void*>(reinterpret_cast<uint64_t>(address) | kTag); }
void* untag(const void* address) { return reinterpret_cast<void*>(reinterpret_cast<uint64_t>(address) & ~kTag); }

// Memory in use, by process and device. A process that was killed leaves its line, which then no longer counts.
struct Line {
  std::atomic<int64_t> pid, used[kMaxDevices];
};

Line* map_lines() {
  const char* path = getenv("PRETEND_NPU_MEMORY");
  const int file = path ? open(path, O_RDWR | O_CREAT, 0600) : -1;
  TORCH_CHECK(!path || (file >= 0 && ftruncate(file, sizeof(Line) * kMaxProcesses) == 0), "cannot open ", path);
  void* memory = mmap(nullptr, sizeof(Line) * kMaxProcesses, PROT_READ | PROT_WRITE, path ? MAP_SHARED : MAP_SHARED | MAP_ANONYMOUS, file, 0);
  TORCH_CHECK(memory != MAP_FAILED, "cannot map the memory counts");
  return static_cast<Line*>(memory);
}

Line* lines() {
  static Line* mapped = map_lines();
  return mapped;
}

Line& find_own_line() {
  static std::mutex mutex;
  static Line* own = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> guard(mutex);
  const pid_t me = getpid();  // a forked process needs its own
  if (owner == me) return *own;
  for (int i = 0; i < kMaxProcesses; ++i) {
    int64_t pid = lines()[i].pid;
    if ((!pid || (pid != me && kill(static_cast<pid_t>(pid), 0) != 0)) && lines()[i].pid.compare_exchange_strong(pid, me)) {
      for (auto& used : lines()[i].used) used = 0;
      own = &lines()[i], owner = me;
      return *own;
    }
  }
  TORCH_CHECK(false, "more than ", kMaxProcesses, " processes use the pretend device");
}

int64_t count_used(c10::DeviceIndex device) {
  int64_t sum = 0;
  for (int i = 0; i < kMaxProcesses; ++i) {
    const int64_t pid = lines()[i].pid;
    if (pid && kill(static_cast<pid_t>(pid), 0) == 0) sum += lines()[i].used[count_hidden() + device];
  }
  return sum;
}

int64_t memory_limit() { return read_number("PRETEND_NPU_BYTES", int64_t{8} << 30); }

struct Block {
  void* address;
  int64_t size;
  c10::DeviceIndex device;
};

std::atomic<int64_t> own_bytes[kMaxDevices], peak_bytes[kMaxDevices];

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  find_own_line().used[count_hidden() + block->device] -= block->size;
  own_bytes[block->device] -= block->size;
  free(block->address);
  delete block;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device device(c10::kPrivateUse1, current_device);
    if (!size) return {nullptr, nullptr, &release, device};
    const auto wanted = static_cast<int64_t>((size + kLine - 1) / kLine * kLine);
    const int64_t free_bytes = memory_limit() - count_used(current_device);
    TORCH_CHECK_WITH(
        OutOfMemoryError, wanted <= free_bytes, "npu out of memory: ", wanted, " bytes wanted, ", free_bytes, " of ", memory_limit(), " are free");
    void* address = aligned_alloc(kLine, wanted);
    find_own_line().used[count_hidden() + current_device] += wanted;
    const int64_t now = own_bytes[current_device] += wanted;
    if (now > peak_bytes[current_device]) peak_bytes[current_device] = now;
    return {tag(address), new Block{address, wanted, current_device}, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { memcpy(untag(to), untag(from), size); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* array : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) {
      auto& all = (*array)[0];
      all.current = own_bytes[device], all.peak = peak_bytes[device];
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { peak_bytes[device] = own_bytes[device].load(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return {std::max<int64_t>(0, memory_limit() - count_used(device)), memory_limit()};
  }
} allocator;
REGISTER_ALLOCATOR(c10::kPrivateUse1, &allocator);

// Pinned memory is ordinary host memory whose addresses are known.
std::mutex pinned_mutex;
std::map<uintptr_t, size_t> pinned;

void release_pinned(void* address) {
  std::lock_guard<std::mutex> guard(pinned_mutex);
  pinned.erase(reinterpret_cast<uintptr_t>(address));
  free(address);
}

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t size) override {
    void* address = aligned_alloc(kLine, (size + kLine) / kLine * kLine);
    std::lock_guard<std::mutex> guard(pinned_mutex);
    pinned[reinterpret_cast<uintptr_t>(address)] = size;
    return {address, address, &release_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t size) const override { memcpy(to, from, size); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
} pinned_allocator;

bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> guard(pinned_mutex);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto next = pinned.upper_bound(address);
  return next != pinned.begin() && address < (--next)->first + next->second;
}

// A tensor on the host that shares the memory of a device tensor.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  const auto options = tensor.options().device(at::kCPU);
  if (!tensor.numel()) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::from_blob(untag(tensor.data_ptr()), tensor.sizes(), tensor.strides(), options);
}

std::mutex counts_mutex;
std::map<std::string, int64_t> counts;
void count(const std::string& name, int64_t number = 1) {
  std::lock_guard<std::mutex> guard(counts_mutex);
  counts[name] += number;
}

std::mutex deferred_mutex, running_mutex;
std::vector<std::pair<at::Tensor, at::Tensor>> deferred;

// Runs the deferred copies, as the device would before anything that follows in its stream. Returns when those that another thread runs
// are done, too. The tensors are let go of at the very end, where Python's lock may be needed.
void catch_up() {
  std::vector<std::pair<at::Tensor, at::Tensor>> copies;
  std::lock_guard<std::mutex> running(running_mutex);
  {
    std::lock_guard<std::mutex> guard(deferred_mutex);
    copies.swap(deferred);
  }
  for (auto& [to, from] : copies) {
    auto host = on_host(to);
    at::native::copy_(host, from, false);
  }
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const std::string kind = from.is_cpu() ? "copy to device" : to.is_cpu() ? "copy to host" : "copy on device";
  count(kind);
  count(kind + " bytes", static_cast<int64_t>(to.nbytes()));
  if (non_blocking && from.is_cpu() && from.numel() && is_pinned(from.data_ptr())) {
    count("deferred copy");
    std::lock_guard<std::mutex> guard(deferred_mutex);
    deferred.emplace_back(to, from);
    return to;
  }
  catch_up();
  auto host = on_host(to);
  at::native::copy_(host, on_host(from), false);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  c10::DeviceGuard guard(to.device());
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kPrivateUse1; }
  c10::Device getDevice() const override { return {c10::kPrivateUse1, current_device}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override {
    if (!device.has_index()) return;
    TORCH_CHECK(device.index() < count_devices(), "npu error: invalid device ordinal ", int{device.index()}, " of ", count_devices());
    current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(count_devices()); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override { *event = &current_device; }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    std::lock_guard<std::mutex> guard(deferred_mutex);
    return deferred.empty();
  }
  void synchronizeEvent(void*) const override { catch_up(); }
  void synchronizeStream(const c10::Stream&) const override { catch_up(); }
  void synchronizeDevice(const c10::DeviceIndex) const override { catch_up(); }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return count_devices() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(count_devices()); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override { Guard().setDevice({c10::kPrivateUse1, device}); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
};

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
using Layout = std::optional<c10::Layout>;
using Type = std::optional<c10::ScalarType>;
using Where = std::optional<c10::Device>;
using Flag = std::optional<bool>;
using Format = std::optional<c10::MemoryFormat>;

at::Tensor empty(c10::IntArrayRef size, Type type, Layout, Where where, Flag, Format format) {
  c10::DeviceGuard guard(c10::device_or_default(where));
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(type), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, Type type, Layout, Where where, Flag) {
  c10::DeviceGuard guard(c10::device_or_default(where));
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(type));
}
at::Scalar local_scalar(const at::Tensor& tensor) {
  catch_up();
  count("wait for a value");
  return at::native::_local_scalar_dense_cpu(on_host(tensor));
}
at::Tensor as_strided(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(tensor, size, stride, std::move(offset));
}
const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size, Format format) {
  c10::DeviceGuard guard(tensor.device());
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(size), format);
}
at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef size) { return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size)); }
at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& source) { return at::native::set_tensor_(tensor, source); }
at::Tensor& set_storage(at::Tensor& tensor, at::Storage source) { return at::native::set_(tensor, std::move(source)); }
at::Tensor& set_part(at::Tensor& tensor, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::cpu::set_(tensor, std::move(source), offset, size, stride);
}

// Every other operator: on the host, if its tensors are on one device. Scalars and indices may be on the host, as with CUDA.
void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().operator_name();
  std::optional<c10::Device> found;
  bool has_host = false;
  auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.is_cpu()) {
      has_host |= tensor.dim() > 0;
      return;
    }
    TORCH_CHECK(!found || *found == tensor.device(), name, ": tensors on ", *found, " and on ", tensor.device());
    found = tensor.device();
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) for (const auto& tensor : value.toTensorVector()) look(tensor);
  }
  TORCH_CHECK(!(found && has_host), name, ": expected all tensors to be on ", *found, ", but found one on cpu");
  catch_up();
  count("operator");
  count("operator " + name.name + (name.overload_name.empty() ? "" : "." + name.overload_name));
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("resize_", resize);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("view", view);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_part);
}

}  // namespace

extern "C" {
void pretend_npu_register() {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}
int pretend_npu_device_count() { return count_devices(); }
int pretend_npu_first_device() { return count_hidden(); }
int pretend_npu_current_device() { return current_device; }
void pretend_npu_set_device(int device) { Guard().uncheckedSetDevice({c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device)}); }
void pretend_npu_synchronize() { catch_up(); }
void pretend_npu_reset_counts() {
  std::lock_guard<std::mutex> guard(counts_mutex);
  counts.clear();
}
// Writes "name\tnumber\n" of every count into `text`; returns the number of bytes needed.
int64_t pretend_npu_counts(char* text, int64_t size) {
  std::lock_guard<std::mutex> guard(counts_mutex);
  std::string all;
  for (const auto& [name, number] : counts) all += name + "\t" + std::to_string(number) + "\n";
  if (static_cast<int64_t>(all.size()) <= size) memcpy(text, all.data(), all.size());
  return static_cast<int64_t>(all.size());
}
}
