#include "products.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

namespace moelora {
namespace {

// Columns of x per pass of `down`, and of a task of `gather`: what a few rows of fits the first-level cache.
constexpr int64_t CHUNK = 512, WIDE = 256;
// Ranks of a task of `gather`, and pairs between two visits to its sums.
constexpr int64_t RANKS = 32, PAIRS = 64;
// Floats of y that a task of `up` returns to for every unit: what fits the second-level cache beside the factors.
constexpr int64_t TILE = 64 * 1024;
// Floats of a cache line.
constexpr int64_t LINE = 16;
// Tasks worth having for many threads.
constexpr int64_t MANY = 64;

int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

struct Free {
  void operator()(float* data) const { ::operator delete(data, std::align_val_t(64)); }
};

std::unique_ptr<float, Free> buffer(int64_t count) {
  return std::unique_ptr<float, Free>(
      static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), std::align_val_t(64))));
}

const void* at(const Matrix& matrix, int64_t row, int64_t column) {
  const int64_t place = row * matrix.stride + column;
  return matrix.half ? static_cast<const void*>(static_cast<const bf16*>(matrix.data) + place)
                     : static_cast<const void*>(static_cast<const float*>(matrix.data) + place);
}

// Writes float32 rows to either type.
void put(const float* from, int64_t from_stride, int64_t rows, int64_t columns, const Target& to, int64_t row,
         int64_t column) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = (row + r) * to.stride + column;
    if (to.half)
      kernels().narrow(from + r * from_stride, static_cast<bf16*>(to.data) + place, columns);
    else
      std::memcpy(static_cast<float*>(to.data) + place, from + r * from_stride,
                  static_cast<size_t>(columns) * sizeof(float));
  }
}

const Kernels* choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (avx512_kernels() != nullptr && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512_kernels();
  if (avx2_kernels() != nullptr && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return avx2_kernels();
#endif
  return portable_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

Factor factor(const Matrix& from, const Plan& plan, int64_t width, int64_t features, Workspace& memory) {
  if (!from.half) return {static_cast<const float*>(from.data), from.stride};
  auto* to = memory.take<float>(plan.units * width * features);
  parallel(plan.units, width * features, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u)
      for (int64_t row = u * width; plan.used(u) && row < (u + 1) * width; ++row)
        kernels().widen(static_cast<const bf16*>(at(from, row, 0)), to + row * features, features);
  });
  return {to, features};
}

Factor transposed(const Matrix& from, const Plan& plan, int64_t width, int64_t features, Workspace& memory) {
  constexpr int64_t ROWS = 64;
  // An odd number of cache lines per row: with rows 4 KiB apart, all of them would compete for one place in the cache.
  const int64_t stride = (tiles(features, LINE) | 1) * LINE;
  auto* to = memory.take<float>(plan.units * width * stride);
  parallel(tiles(features, ROWS), ROWS * width * plan.units, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * ROWS; o < std::min(end * ROWS, features); o += ROWS)
      for (int64_t u = 0, next; u < plan.units; u = next) {
        next = u + 1;
        if (!plan.used(u)) continue;
        while (next < plan.units && plan.used(next)) ++next;
        kernels().transpose[from.half](at(from, o, u * width), from.stride, std::min(ROWS, features - o),
                                       (next - u) * width, to + u * width * stride + o, stride);
      }
  });
  return {to, stride};
}

void down(const Matrix& x, const Factor& w, const Plan& plan, int64_t width, int64_t length, float* out) {
  const int64_t groups = std::clamp<int64_t>(MANY / plan.blocks, 1, plan.units);
  parallel(plan.blocks * groups, plan.pairs() * width * length / (plan.blocks * groups), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, group = task % groups;
      const int64_t from = plan.units * group / groups, to = plan.units * (group + 1) / groups;
      for (int64_t d = 0; d < length; d += CHUNK)
        for (int64_t u = from; u < to; ++u) {
          const int64_t pair = plan.begin[u * plan.blocks + b], count = plan.begin[u * plan.blocks + b + 1] - pair;
          kernels().dot[x.half](at(x, 0, d), x.stride, plan.row + pair, count, w.data + u * width * w.stride + d,
                                w.stride, width, std::min(CHUNK, length - d), out + pair * width, width, d > 0);
        }
    }
  });
}

void up(const float* u, const Factor& w, const Plan& plan, int64_t width, int64_t columns, const Target& y) {
  const int64_t tile = TILE / plan.block, across = tiles(columns, tile);
  parallel(plan.blocks * across, plan.pairs() * width * columns / (plan.blocks * across), [&](int64_t begin, int64_t end) {
    // bfloat16 is summed in float32 beside y. The rows of that tile are numbered as y's, hence the shift to `origin`.
    const auto wide = y.half ? buffer(plan.block * tile) : nullptr;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / across, o = task % across * tile, some = std::min(tile, columns - o);
      const int64_t token = b * plan.block, tokens = std::min(plan.block, plan.tokens - token);
      const int64_t stride = y.half ? tile : y.stride;
      float* corner = y.half ? wide.get() : static_cast<float*>(y.data) + token * y.stride + o;
      for (int64_t unit = 0; unit < plan.units; ++unit) {
        const int64_t pair = plan.begin[unit * plan.blocks + b];
        const int64_t count = plan.begin[unit * plan.blocks + b + 1] - pair;
        kernels().expand(u + pair * width, width, plan.row + pair, plan.fresh + pair, count,
                         w.data + unit * width * w.stride + o, w.stride, width, some, corner, token, stride);
      }
      if (y.half) put(corner, stride, tokens, some, y, token, o);
    }
  });
}

void gather(const float* u, const Matrix& x, const Plan& plan, int64_t width, int64_t columns, const Target& out,
            bool across) {
  // A task owns some rows of the result and a stretch of its columns. Narrow units go together, so that a transposed
  // result is written in whole cache lines.
  const int64_t together = std::max<int64_t>(1, LINE / width), groups = tiles(plan.units, together);
  const int64_t parts = tiles(width, RANKS), stretches = tiles(columns, WIDE);
  const int64_t tasks = stretches * groups * parts;
  // Stretches outermost: tasks that follow each other read the same columns of x, while they are in the cache.
  parallel(tasks, plan.pairs() * width * columns / tasks, [&](int64_t begin, int64_t end) {
    const auto sums = buffer(RANKS * WIDE), turned = buffer(RANKS * WIDE);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task / (groups * parts) * WIDE, some = std::min(WIDE, columns - o);
      const int64_t unit = task / parts % groups * together, units = std::min(together, plan.units - unit);
      const int64_t rank = task % parts * RANKS, ranks = std::min(RANKS, width - rank);
      std::memset(sums.get(), 0, static_cast<size_t>(units * ranks * WIDE) * sizeof(float));
      for (int64_t i = 0; i < units; ++i)
        for (int64_t pair = plan.first(unit + i); pair < plan.last(unit + i); pair += PAIRS)
          kernels().outer[x.half](at(x, 0, o), x.stride, plan.row + pair, std::min(PAIRS, plan.last(unit + i) - pair),
                                  u + pair * width + rank, width, ranks, some, sums.get() + i * ranks * WIDE, WIDE);
      const int64_t rows = units * ranks, to = unit * width + rank;
      if (!across) {
        put(sums.get(), WIDE, rows, some, out, to, o);
      } else if (out.half) {
        kernels().transpose[0](sums.get(), WIDE, rows, some, turned.get(), RANKS);
        put(turned.get(), RANKS, some, rows, out, o, to);
      } else {
        kernels().transpose[0](sums.get(), WIDE, rows, some, static_cast<float*>(out.data) + o * out.stride + to,
                               out.stride);
      }
    }
  });
}

void widen_rows(const Matrix& from, int64_t rows, int64_t columns, float* to) {
  parallel(rows, columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (from.half)
        kernels().widen(static_cast<const bf16*>(at(from, r, 0)), to + r * columns, columns);
      else
        std::memcpy(to + r * columns, at(from, r, 0), static_cast<size_t>(columns) * sizeof(float));
    }
  });
}

void narrow_rows(const float* from, int64_t rows, int64_t columns, const Target& to) {
  parallel(rows, columns, [&](int64_t begin, int64_t end) {
    put(from + begin * columns, columns, end - begin, columns, to, begin, 0);
  });
}

}  // namespace moelora
