#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstring>

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// void simt_switch(void** save_stack_pointer, void* load_stack_pointer)
// Saves what the calling convention lets a callee change only if it restores it, exchanges the stacks, restores.
extern "C" void simt_switch(void** save_stack_pointer, void* load_stack_pointer);

#if defined(__x86_64__)
// Loading the floating-point control words is slow and they hardly ever differ, so they are compared first.
asm(R"(
.text
.p2align 4
.type simt_switch, @function
.hidden simt_switch
.globl simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movl (%rsp), %eax
  movzwl 4(%rsp), %ecx
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  cmpl (%rsp), %eax
  jne 1f
  cmpw 4(%rsp), %cx
  jne 1f
2:
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
1:
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  jmp 2b
.size simt_switch, .-simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.type simt_switch, %function
.hidden simt_switch
.globl simt_switch
simt_switch:
  sub sp, sp, #176
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mrs x9, fpcr
  str x9, [sp, #160]
  mov x10, sp
  str x10, [x0]
  mov sp, x1
  ldr x11, [sp, #160]
  cmp x9, x11
  b.eq 1f
  msr fpcr, x11
1:
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
.size simt_switch, .-simt_switch
)");
#else
#error "the SIMT emulator has a context switch for x86-64 and aarch64 only"
#endif

namespace simt {
namespace {

constexpr size_t kMaxStacks = 64 * 1024;
constexpr size_t kCanaryWords = 8;
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11u;

}  // namespace

void switch_context(Context& from, Context& to) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
  simt_switch(&from.stack_pointer, to.stack_pointer);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

void finish_first_switch([[maybe_unused]] Context& came_from) {
#if defined(SIMT_ASAN)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (came_from.stack_bottom == nullptr) {
    came_from.stack_bottom = bottom;
    came_from.stack_bytes = bytes;
  }
#endif
}

size_t StackSlab::capacity() {
  // Only touched pages cost memory. A system that forbids overcommit may refuse the full size: then take less.
  for (size_t count = kMaxStacks; capacity_ == 0 && count >= 2048; count /= 2) {
    void* base =
        mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) continue;
    base_ = static_cast<char*>(base);
    capacity_ = count;
  }
  return capacity_;
}

void StackSlab::prepare(Context& context, size_t index, void (*entry)()) {
  for (; canaries_ <= index; ++canaries_) write_canary(canaries_);
#if defined(SIMT_ASAN)
  // The outermost frames of the fiber that ended here never returned, so AddressSanitizer believes they are in use.
  constexpr size_t kOutermostBytes = 16 * 1024;
  __asan_unpoison_memory_region(low_end(index) + kStackBytes - kOutermostBytes, kOutermostBytes);
#endif
  // The lanes of a warp start at different cache sets: equal offsets in equally sized stacks would evict each other.
  char* top = low_end(index) + kStackBytes - 128 * (index % 32);
#if defined(__x86_64__)
  // From low to high: control words, six registers, the address `ret` goes to, and a null return address for entry().
  auto* frame = reinterpret_cast<uint64_t*>(top) - 9;
  std::memset(frame, 0, 72);
  uint32_t mxcsr;
  uint16_t control_word;
  asm volatile("stmxcsr %0; fnstcw %1" : "=m"(mxcsr), "=m"(control_word));
  std::memcpy(frame, &mxcsr, 4);
  std::memcpy(reinterpret_cast<char*>(frame) + 4, &control_word, 2);
  frame[7] = reinterpret_cast<uint64_t>(entry);
#else
  auto* frame = reinterpret_cast<uint64_t*>(top) - 22;
  std::memset(frame, 0, 176);
  frame[11] = reinterpret_cast<uint64_t>(entry);
  asm volatile("mrs %0, fpcr" : "=r"(frame[20]));
#endif
  context.stack_pointer = frame;
  context.stack_bottom = low_end(index);
  context.stack_bytes = kStackBytes;
  context.fake_stack = nullptr;
}

void StackSlab::write_canary(size_t index) {
  auto* canary = reinterpret_cast<uint64_t*>(low_end(index));
  for (size_t i = 0; i < kCanaryWords; ++i) canary[i] = kCanary;
}

bool StackSlab::canary_intact(size_t index) const {
  const auto* canary = reinterpret_cast<const uint64_t*>(low_end(index));
  for (size_t i = 0; i < kCanaryWords; ++i) {
    if (canary[i] != kCanary) return false;
  }
  return true;
}

bool StackSlab::repair(size_t index) {
  if (index >= canaries_) return false;
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(low_end(index), kStackBytes);
#endif
  const bool overflowed = !canary_intact(index);
  write_canary(index);
  return overflowed;
}

void StackSlab::release_beyond(size_t count) {
  if (count >= canaries_) return;
  madvise(low_end(count), (canaries_ - count) * kStackBytes, MADV_DONTNEED);
  canaries_ = count;
}

}  // namespace simt
