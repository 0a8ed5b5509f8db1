// Parallel loops over independent tasks, and memory: scratch that each thread keeps, and huge pages for large results.
#pragma once

#include <stdint.h>

namespace fastseg {

// A buffer of at least `bytes`, aligned to 64 bytes, private to the calling thread and valid until its next call of
// scratch(), or the end of its tasks. Kept from call to call, unless it is large: a fresh allocation's page faults cost
// more than the arithmetic of a small task. Null where memory ran out.
void* scratch(int64_t bytes);

// Memory for one call, shared by its threads; aligned to 64 bytes. Throws std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

// Asks the operating system to back fresh memory by huge pages where it holds any; a hint, which changes no value.
// Large results are new memory at every call, and touching it 4 KB at a time costs more than computing them.
void advise_huge_pages(void* data, int64_t bytes);

// Calls run(context, task) for every task in [0, tasks) on up to `threads` threads. Returns false where any run did.
bool parallel_for(int64_t tasks, int threads, bool (*run)(void* context, int64_t task), void* context);

// The same for a callable object; throws std::bad_alloc where one returned false (its scratch memory ran out).
void throw_out_of_memory();

template <class Task>
void for_each_task(int64_t tasks, int threads, Task task) {
  const auto run = [](void* context, int64_t index) { return (*static_cast<Task*>(context))(index); };
  if (!parallel_for(tasks, threads, run, &task)) throw_out_of_memory();
}

}  // namespace fastseg
