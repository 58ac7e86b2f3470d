#include "core/workspace.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace taps {

// CPU memory is our own mapping: page aligned, in huge pages where the kernel gives them (a fresh
// buffer costs up to five times the multiplication in page faults otherwise). CUDA memory is a
// tensor of torch's caching allocator.
struct Buffer {
  Buffer(bool cuda, int device, size_t size) : bytes(size) {
    if (cuda) {
      const int64_t count = static_cast<int64_t>(size), stride = 1;
      // fp64 elements, because the allocation helper speaks the kernels' types.
      const int64_t doubles = (count + 7) / 8;
      tensor = empty_strided(Span(&doubles, 1), Span(&stride, 1), Dtype::kFloat64, Place{true, device});
      check_torch(aoti_torch_get_data_ptr(tensor->get(), &data), "workspace");
      return;
    }
    data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      data = nullptr;
      fail("workspace: could not allocate ", bytes, " bytes");
    }
    madvise(data, bytes, MADV_HUGEPAGE);
  }
  ~Buffer() {
    if (!tensor && data) munmap(data, bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  size_t bytes;
  void* data = nullptr;
  std::optional<Tensor> tensor;
};

namespace {

// Of the CPU.
struct Pool {
  std::mutex mutex;
  std::vector<std::unique_ptr<Buffer>> free;
  size_t bytes = 0;

  std::unique_ptr<Buffer> take() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (free.empty()) return nullptr;
    std::unique_ptr<Buffer> buffer = std::move(free.back());
    free.pop_back();
    return buffer;
  }
  void made(const Buffer& buffer) {
    const std::lock_guard<std::mutex> lock(mutex);
    bytes += buffer.bytes;
  }
  void gone(const Buffer& buffer) {
    const std::lock_guard<std::mutex> lock(mutex);
    bytes -= buffer.bytes;
  }
  void give_back(std::unique_ptr<Buffer> buffer) {
    const std::lock_guard<std::mutex> lock(mutex);
    free.push_back(std::move(buffer));
  }
};

// Never destroyed: other threads may still lease at exit.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

constexpr size_t kPage = 4096;

size_t rounded(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

// On CUDA nothing is kept: torch's allocator hands the same block out again, on the stream that is current, and a graph
// that is captured, or warmed up for it in a pool of its own, gets it from where all its memory comes.
Lease::Lease(bool cuda, int device, size_t bytes) {
  if (bytes == 0) return;
  if (cuda) {
    buffer_ = std::make_unique<Buffer>(true, device, bytes);
    return;
  }
  buffer_ = pool().take();
  if (buffer_ && buffer_->bytes >= bytes) return;
  if (buffer_) {  // too small: free it before its successor is made
    pool().gone(*buffer_);
    buffer_.reset();
  }
  buffer_ = std::make_unique<Buffer>(false, 0, rounded(bytes));
  pool().made(*buffer_);
}

Lease::Lease() = default;
Lease::Lease(Lease&& other) noexcept = default;

Lease& Lease::operator=(Lease&& other) noexcept {
  std::swap(buffer_, other.buffer_);
  return *this;
}

Lease::~Lease() {
  if (buffer_ && !buffer_->tensor) pool().give_back(std::move(buffer_));
}

void* Lease::data() const { return buffer_ ? buffer_->data : nullptr; }

size_t workspace_bytes() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().bytes;
}

void workspace_clear() {
  std::vector<std::unique_ptr<Buffer>> doomed;
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    for (const auto& buffer : pool().free) pool().bytes -= buffer->bytes;
    doomed.swap(pool().free);
  }
}

}  // namespace taps
