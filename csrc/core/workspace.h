// The reused buffer that W_t is rebuilt into, and that the CPU's fused products pack their input into. On the CPU it is
// one, grown to the largest of either, leased while a host call needs it; two host threads get two buffers, and no lock
// is held while torch runs. On CUDA it comes from torch's allocator for as long as a call takes.
#pragma once

#include <cstddef>
#include <memory>

namespace taps {

struct Buffer;

class Lease {
 public:
  Lease();
  Lease(bool cuda, int device, size_t bytes);
  ~Lease();
  Lease(Lease&& other) noexcept;
  Lease& operator=(Lease&& other) noexcept;

  void* data() const;

 private:
  std::unique_ptr<Buffer> buffer_;
};

size_t workspace_bytes();  // of all buffers of the CPU, leased ones included
void workspace_clear();    // frees the buffers that are not leased

}  // namespace taps
