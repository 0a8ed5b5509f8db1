#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastseg {
namespace {

constexpr Isa kIsas[] = {
#define FASTSEG_LIST(name) Isa::name,
    FASTSEG_FOR_EACH_ISA(FASTSEG_LIST)
#undef FASTSEG_LIST
};

constexpr int kUndecided = -1;
std::atomic<int> selected{kUndecided};

Isa parse(const char* name) {
  std::string runnable;
  for (Isa isa : kIsas) {
    if (isa > best_isa()) break;
    if (std::strcmp(name, name_of(isa)) == 0) return isa;
    runnable += std::string(runnable.empty() ? "" : ", ") + name_of(isa);
  }
  throw std::invalid_argument("instruction set '" + std::string(name) + "' is not one that this machine runs (" +
                              runnable + "); check FASTSEG_CPU_ISA");
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
#define FASTSEG_NAME(name) \
  case Isa::name:          \
    return #name;
    FASTSEG_FOR_EACH_ISA(FASTSEG_NAME)
#undef FASTSEG_NAME
  }
  return "unknown";
}

Isa best_isa() {
#if defined(__x86_64__) && !defined(FASTSEG_PORTABLE_ONLY)
  // The compiler's helpers read cpuid and, for AVX, what the operating system saves on a context switch (xgetbv).
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

Isa active_isa() {
  int current = selected.load(std::memory_order_relaxed);
  if (current == kUndecided) {
    const char* wish = std::getenv("FASTSEG_CPU_ISA");
    current = static_cast<int>(wish != nullptr && *wish != '\0' ? parse(wish) : best_isa());
    selected.store(current, std::memory_order_relaxed);
  }
  return static_cast<Isa>(current);
}

void select_isa(const char* name) {
  selected.store(static_cast<int>(parse(name)), std::memory_order_relaxed);
}

}  // namespace fastseg
