#include "fiber.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#define TAPS_FIBER_ASM 1
#else
#define TAPS_FIBER_ASM 0
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace twin {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStackBytes = 256 << 10;
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif

#if TAPS_FIBER_ASM
// Saves the registers that a call must keep, and the stack pointer in *save; goes on where `to` was left.
extern "C" void taps_twin_switch(void** save, void* to);
// Where a new fiber begins: calls r12 with rbx.
extern "C" void taps_twin_trampoline();
asm(R"(
.text
.globl taps_twin_switch
.type taps_twin_switch, @function
taps_twin_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size taps_twin_switch, .-taps_twin_switch
.globl taps_twin_trampoline
.type taps_twin_trampoline, @function
taps_twin_trampoline:
  movq %rbx, %rdi
  call *%r12
  ud2
.size taps_twin_trampoline, .-taps_twin_trampoline
)");
#endif

}  // namespace

struct Fiber::Stack {
  unsigned char* memory = static_cast<unsigned char*>(std::aligned_alloc(4096, kStackBytes));
#if TAPS_FIBER_ASM
  void* mine = nullptr;
  void* callers = nullptr;
#else
  ucontext_t mine, callers;
#endif
  void* mine_fake = nullptr;  // AddressSanitizer's
  void* callers_fake = nullptr;
  const void* callers_bottom = nullptr;
  std::size_t callers_bytes = 0;

  ~Stack() { std::free(memory); }

  void switch_in() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&callers_fake, memory, kStackBytes);
#endif
#if TAPS_FIBER_ASM
    taps_twin_switch(&callers, mine);
#else
    swapcontext(&callers, &mine);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(callers_fake, nullptr, nullptr);
#endif
  }

  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(mine_fake, &callers_bottom, &callers_bytes);
#endif
  }

  void switch_out([[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &mine_fake, callers_bottom, callers_bytes);
#endif
#if TAPS_FIBER_ASM
    taps_twin_switch(&mine, callers);
#else
    swapcontext(&mine, &callers);
#endif
    entered();
  }
};

Fiber::Fiber() : stack_(std::make_unique<Stack>()) {}
Fiber::~Fiber() = default;

void Fiber::entry(Fiber* self) {
  self->stack_->entered();
  self->body_();
  self->done_ = true;
  self->stack_->switch_out(true);
}

void Fiber::start(const std::function<void()>& body) {
  body_ = body;
  done_ = false;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_->memory, kStackBytes);
#endif
  stack_->mine_fake = nullptr;
#if TAPS_FIBER_ASM
  // What a switch pops: six registers and the address to go on at. Two words above keep the stack aligned.
  auto* top = reinterpret_cast<uint64_t*>(stack_->memory + kStackBytes) - 2;
  top[0] = top[1] = 0;
  void (*const begin)(Fiber*) = &Fiber::entry;
  *--top = reinterpret_cast<uint64_t>(&taps_twin_trampoline);
  *--top = 0;                                  // rbp
  *--top = reinterpret_cast<uint64_t>(this);   // rbx
  *--top = reinterpret_cast<uint64_t>(begin);  // r12
  for (int i = 0; i < 3; ++i) *--top = 0;      // r13, r14, r15
  stack_->mine = top;
#else
  getcontext(&stack_->mine);
  stack_->mine.uc_stack.ss_sp = stack_->memory;
  stack_->mine.uc_stack.ss_size = kStackBytes;
  stack_->mine.uc_link = nullptr;
  const auto self = reinterpret_cast<uintptr_t>(this);
  makecontext(&stack_->mine, reinterpret_cast<void (*)()>(+[](unsigned low, unsigned high) {
    entry(reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low));
  }),
              2, static_cast<unsigned>(self), static_cast<unsigned>(self >> 32));
#endif
}

void Fiber::resume() { stack_->switch_in(); }
void Fiber::yield() { stack_->switch_out(false); }

}  // namespace twin
