#include "workspace.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "device.h"
#include "tensor.h"

namespace taps {

using Key = std::tuple<bool, int, void*>;

// CPU memory is our own mapping: page aligned, in huge pages where the kernel gives them (a fresh
// buffer costs up to five times the multiplication in page faults otherwise). CUDA memory is a
// tensor of torch's caching allocator.
struct Buffer {
  Buffer(const Key& where, size_t size) : key(where), bytes(size) {
    if (std::get<0>(key)) {
      const int64_t count = static_cast<int64_t>(size), stride = 1;
      // fp64 elements, because the allocation helper speaks the kernels' types.
      const int64_t doubles = (count + 7) / 8;
      tensor = empty_strided(Span(&doubles, 1), Span(&stride, 1), Dtype::kFloat64, Place{true, std::get<1>(key)});
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
    if (!std::get<0>(key) && data) munmap(data, bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  Key key;
  size_t bytes;
  void* data = nullptr;
  unsigned age = 0;    // how often the limit had been set when it was made
  bool cached = true;  // false: made while a graph is captured, belongs to that graph's pool
  std::optional<Tensor> tensor;
};

namespace {

struct Pool {
  std::mutex mutex;
  std::map<Key, std::vector<std::unique_ptr<Buffer>>> free;
  size_t bytes = 0;
  unsigned age = 0;

  std::unique_ptr<Buffer> take(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& buffers = free[key];
    if (buffers.empty()) return nullptr;
    std::unique_ptr<Buffer> buffer = std::move(buffers.back());
    buffers.pop_back();
    return buffer;
  }
  void made(Buffer& buffer) {
    const std::lock_guard<std::mutex> lock(mutex);
    bytes += buffer.bytes;
    buffer.age = age;
  }
  void gone(const Buffer& buffer) {
    const std::lock_guard<std::mutex> lock(mutex);
    bytes -= buffer.bytes;
  }
  void give_back(std::unique_ptr<Buffer> buffer) {
    std::unique_ptr<Buffer> doomed;  // freed after the lock
    const std::lock_guard<std::mutex> lock(mutex);
    if (buffer->age != age) {  // leased while the limit was set
      bytes -= buffer->bytes;
      doomed = std::move(buffer);
      return;
    }
    auto& buffers = free[buffer->key];
    buffers.push_back(std::move(buffer));
  }
};

// Never destroyed: at exit CUDA may be gone before the pool's turn comes.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

constexpr size_t kPage = 4096;

size_t rounded(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

std::atomic<size_t>& limit() {
  static std::atomic<size_t> bytes{0};
  return bytes;
}

}  // namespace

Lease::Lease(bool cuda, int device, void* stream, size_t bytes) {
  if (bytes == 0) return;
  const Key key{cuda, cuda ? device : 0, stream};
  if (cuda && cuda::is_capturing(stream)) {
    buffer_ = std::make_unique<Buffer>(key, bytes);
    buffer_->cached = false;
    return;
  }
  buffer_ = pool().take(key);
  if (buffer_ && buffer_->bytes >= bytes) return;
  if (buffer_) {  // too small: free it before its successor is made
    pool().gone(*buffer_);
    buffer_.reset();
  }
  buffer_ = std::make_unique<Buffer>(key, rounded(bytes));
  pool().made(*buffer_);
}

Lease::Lease() = default;
Lease::Lease(Lease&& other) noexcept = default;

Lease& Lease::operator=(Lease&& other) noexcept {
  std::swap(buffer_, other.buffer_);
  return *this;
}

Lease::~Lease() {
  if (buffer_ && buffer_->cached) pool().give_back(std::move(buffer_));
}

void* Lease::data() const { return buffer_ ? buffer_->data : nullptr; }
size_t Lease::bytes() const { return buffer_ ? buffer_->bytes : 0; }

size_t workspace_limit() { return limit().load(std::memory_order_relaxed); }

void set_workspace_limit(size_t bytes) {
  limit().store(bytes, std::memory_order_relaxed);
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    ++pool().age;
  }
  workspace_clear();
}

size_t workspace_bytes() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().bytes;
}

void workspace_clear() {
  std::vector<std::unique_ptr<Buffer>> doomed;
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    for (auto& entry : pool().free) {
      for (auto& buffer : entry.second) {
        pool().bytes -= buffer->bytes;
        doomed.push_back(std::move(buffer));
      }
    }
    pool().free.clear();
  }
}

}  // namespace taps
