#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastseg {
namespace {

constexpr int64_t kAlignment = 64;  // a cache line, and the widest vector

// Aligned memory, for release(). Not aligned_alloc: glibc asks for more than it keeps, so that a block freed is too
// small for the next request of its size (glibc 2.36), and each call's memory lies beside that of the one before.
void* allocate(int64_t bytes) {
  void* const block = std::malloc(static_cast<size_t>(bytes + kAlignment));
  if (block == nullptr) return nullptr;
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(block) / kAlignment + 1) * kAlignment;
  void** const data = reinterpret_cast<void**>(aligned);
  data[-1] = block;  // malloc's own alignment leaves room for it
  return data;
}

void release(void* data) {
  if (data != nullptr) std::free(static_cast<void**>(data)[-1]);
}

// What a thread keeps from call to call: more than the tiles of any ordinary shape take, which are made for its caches.
constexpr int64_t kKeptBytes = 4 << 20;

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;

  ~Buffer() { release(data); }

  void resize(int64_t size) {
    release(data);
    data = size == 0 ? nullptr : allocate(size);
    bytes = data == nullptr ? 0 : size;
  }
};

thread_local Buffer buffer;

}  // namespace

void* scratch(int64_t bytes) {
  if (buffer.bytes < bytes) buffer.resize(bytes);
  return buffer.data;
}

Workspace::Workspace(int64_t bytes) : data_(allocate(bytes > 0 ? bytes : 1)) {
  if (data_ == nullptr) throw std::bad_alloc();
}

Workspace::~Workspace() {
  release(data_);
}

void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

bool parallel_for(int64_t tasks, int threads, bool (*run)(void*, int64_t), void* context) {
  std::atomic<bool> ok{true};
  const int team = static_cast<int>(std::min<int64_t>(threads, tasks));
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      if (!run(context, task)) ok.store(false, std::memory_order_relaxed);
    }
    if (buffer.bytes > kKeptBytes) buffer.resize(0);
  }
  return ok.load(std::memory_order_relaxed);
}

void throw_out_of_memory() {
  throw std::bad_alloc();
}

}  // namespace fastseg
