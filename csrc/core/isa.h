// One instruction set is chosen at run time; every kernel file is compiled once for each, in a namespace of its own.
#pragma once

#if defined(__x86_64__) && !defined(FASTSEG_PORTABLE_ONLY)
#define FASTSEG_FOR_EACH_ISA(X) X(portable) X(avx2) X(avx512)
#else
#define FASTSEG_FOR_EACH_ISA(X) X(portable)
#endif

namespace fastseg {

// Ordered: a machine that runs one runs all before it.
enum class Isa : int {
#define FASTSEG_ENUMERATE(name) name,
  FASTSEG_FOR_EACH_ISA(FASTSEG_ENUMERATE)
#undef FASTSEG_ENUMERATE
};

const char* name_of(Isa isa);

// The best instruction set that this machine runs (cpuid and the operating system's word).
Isa best_isa();

// The instruction set in use: best_isa(), or what FASTSEG_CPU_ISA said at the first call, or the last select_isa().
// Throws std::invalid_argument where FASTSEG_CPU_ISA names one that is unknown or that this machine can't run.
Isa active_isa();

void select_isa(const char* name);

}  // namespace fastseg

// Declares `void function(const Arguments&)` in the namespace of every instruction set, and
// `fastseg::function(arguments)`, which calls the active one.
#define FASTSEG_DECLARE_IN(isa, function, Arguments) \
  namespace isa {                                    \
  void function(const Arguments&);                   \
  }
#if defined(__x86_64__) && !defined(FASTSEG_PORTABLE_ONLY)
#define FASTSEG_KERNEL(function, Arguments)          \
  FASTSEG_DECLARE_IN(portable, function, Arguments)  \
  FASTSEG_DECLARE_IN(avx2, function, Arguments)      \
  FASTSEG_DECLARE_IN(avx512, function, Arguments)    \
  inline void function(const Arguments& arguments) { \
    switch (active_isa()) {                          \
      case Isa::portable:                            \
        return portable::function(arguments);        \
      case Isa::avx2:                                \
        return avx2::function(arguments);            \
      case Isa::avx512:                              \
        return avx512::function(arguments);          \
    }                                                \
  }
#else
#define FASTSEG_KERNEL(function, Arguments)          \
  FASTSEG_DECLARE_IN(portable, function, Arguments)  \
  inline void function(const Arguments& arguments) { \
    portable::function(arguments);                   \
  }
#endif
