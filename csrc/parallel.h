// What the algorithms need from their host: threads and memory. operator.cpp provides both through PyTorch.
#pragma once

#include <cstdint>
#include <functional>

namespace moelora {

// Runs work(begin, end) over the tasks 0..tasks-1, on several threads where that pays; cost: about how many numbers a
// task handles. No result may depend on how the tasks are dealt out: each writes its own memory.
void parallel(int64_t tasks, int64_t cost, const std::function<void(int64_t begin, int64_t end)>& work);

int64_t threads();

class Workspace {
 public:
  virtual ~Workspace() = default;

  // Uninitialised memory, aligned for every kernel, freed with the workspace.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  virtual void* bytes(int64_t count) = 0;
};

}  // namespace moelora
