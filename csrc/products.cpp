#include "products.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

namespace moelora {
namespace {

// Floats of x or y that a task returns to for every unit: what the second-level cache holds beside the factors.
constexpr int64_t NEAR = 128 * 1024;
// Columns of x per pass of `down`. It decides in which order lanes are added up, so it may not depend on threads.
constexpr int64_t CHUNK = 512;
// Ranks and columns of a task of `gather`, at most; columns of one of `up` for narrow units, and what is narrow.
constexpr int64_t RANKS = 64, WIDE = 512, PANEL = 256, NARROW = 3;
// For few tokens: ranks of a task of `down`, columns of one of `up`.
constexpr int64_t SLICE = 16, STRETCH = 64;
// Tokens up to which `up_across` turns stretches: beyond, a factor turned once is read again often enough.
constexpr int64_t FEW = 2 * Plan::BLOCK;
// Floats of a cache line.
constexpr int64_t LINE = 16;
// What sums start from where there is no other row for it: as many as a task of `up` has columns.
alignas(64) constexpr float ZEROS[NEAR / Plan::BLOCK] = {};

int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

struct Free {
  void operator()(float* data) const { ::operator delete(data, std::align_val_t(64)); }
};

std::unique_ptr<float, Free> buffer(int64_t count) {
  return std::unique_ptr<float, Free>(
      static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), std::align_val_t(64))));
}

// The tokens cut into parts of whole blocks. A part reads the factors of all its units once, so it should hold some
// tokens for each of them; it must also be small, so that its part of x or y stays near between units.
struct Cut {
  Cut(const Plan& plan, int64_t pairs_per_unit) : plan(plan) {
    const int64_t k = plan.pairs() / plan.tokens;
    blocks = std::clamp<int64_t>(tiles(pairs_per_unit * plan.units / k, Plan::BLOCK), 1, 1024 / Plan::BLOCK);
    tokens = blocks * Plan::BLOCK;
    count = tiles(plan.blocks, blocks);
  }
  // Where the pairs of a unit begin in a part; they end where the next part begins.
  int64_t first(int64_t unit, int64_t part) const {
    return plan.begin[unit * plan.blocks + std::min(part * blocks, plan.blocks)];
  }

  const Plan& plan;
  int64_t blocks, tokens, count;
};

const void* at(const Matrix& matrix, int64_t row, int64_t column) {
  const int64_t place = row * matrix.stride + column;
  return matrix.half ? static_cast<const void*>(static_cast<const bf16*>(matrix.data) + place)
                     : static_cast<const void*>(static_cast<const float*>(matrix.data) + place);
}

// Reads a part of a row as float32.
void get(const Matrix& from, int64_t row, int64_t column, int64_t count, float* to) {
  if (from.half)
    kernels().widen(static_cast<const bf16*>(at(from, row, column)), to, count);
  else
    std::memcpy(to, at(from, row, column), static_cast<size_t>(count) * sizeof(float));
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

// The kernels of a level, or null where the machine or the compiler lacks the instructions.
const Kernels* of_level(int64_t level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512_kernels();
  if (level == 2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels();
#endif
  return level == 1 ? portable_kernels() : nullptr;
}

int64_t highest() {
  int64_t level = 3;
  while (of_level(level) == nullptr) --level;
  return level;
}

std::atomic<int64_t>& current() {
  static std::atomic<int64_t> level{highest()};
  return level;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const all[] = {nullptr, of_level(1), of_level(2), of_level(3)};
  return *all[current().load(std::memory_order_relaxed)];
}

int64_t use(int64_t level) {
  if (of_level(level) != nullptr) current() = level;
  return current();
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
  constexpr int64_t ROWS = 32;
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
  const Cut cut(plan, 16);
  // Ranks are cut only where there is not enough else to share out; a slice is what the kernel takes at a time.
  const int64_t slice = cut.count * plan.units < threads() ? SLICE : width, slices = tiles(width, slice);
  const int64_t tasks = cut.count * plan.units * slices;
  parallel(tasks, plan.pairs() * width * length / tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / (plan.units * slices), unit = task / slices % plan.units, j = task % slices * slice;
      const int64_t pair = cut.first(unit, part), count = cut.first(unit, part + 1) - pair;
      for (int64_t d = 0; d < length; d += CHUNK)
        kernels().dot[x.half](at(x, 0, d), x.stride, plan.row + pair, count, w.data + (unit * width + j) * w.stride + d,
                              w.stride, std::min(slice, width - j), std::min(CHUNK, length - d),
                              out + pair * width + j, width, d > 0);
    }
  });
}

namespace {

// `up` for units of few ranks, token by token: the factors of all units fit the first-level cache for some columns.
void up_narrow(const float* u, const Factor& w, const Plan& plan, int64_t width, int64_t columns, const Matrix& onto,
               const Target& y) {
  const int64_t stretches = tiles(columns, PANEL), ranks = plan.units * width;
  const int64_t k = plan.pairs() / plan.tokens, tasks = stretches * plan.blocks;
  parallel(tasks, plan.pairs() * width * columns / tasks, [&](int64_t begin, int64_t end) {
    const auto panel = buffer(ranks * PANEL), wide = buffer(PANEL), gates = buffer(k * width);
    const auto rows = std::make_unique<int64_t[]>(static_cast<size_t>(k * width));
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t stretch = task / plan.blocks, block = task % plan.blocks;
      const int64_t o = stretch * PANEL, some = std::min(PANEL, columns - o);
      if (stretch != loaded)
        for (int64_t r = 0; r < ranks; ++r)
          if (plan.used(r / width))
            std::memcpy(panel.get() + r * PANEL, w.data + r * w.stride + o, static_cast<size_t>(some) * sizeof(float));
      loaded = stretch;
      for (int64_t t = block * Plan::BLOCK; t < std::min((block + 1) * Plan::BLOCK, plan.tokens); ++t) {
        for (int64_t s = 0; s < k; ++s) {
          const int64_t pair = plan.place[t * k + s];
          for (int64_t j = 0; j < width; ++j) {
            gates.get()[s * width + j] = u[pair * width + j];
            rows[static_cast<size_t>(s * width + j)] = (plan.unit != nullptr ? plan.unit[t * k + s] : s) * width + j;
          }
        }
        float* const to = y.half ? wide.get() : static_cast<float*>(y.data) + t * y.stride + o;
        kernels().combine[onto.half](gates.get(), rows.get(), k * width, panel.get(), PANEL, some,
                                     onto.data != nullptr ? at(onto, t, o) : ZEROS, to);
        if (y.half) put(to, PANEL, 1, some, y, t, o);
      }
    }
  });
}

// `up` by a factor that lies the other way round: turned stretch by stretch, which is written to no memory.
void up_few(const float* u, const Matrix& w, const Plan& plan, int64_t width, int64_t columns, const Matrix& onto,
            const Target& y) {
  const int64_t tasks = tiles(columns, STRETCH);
  parallel(tasks, plan.pairs() * width * STRETCH, [&](int64_t begin, int64_t end) {
    const auto turned = buffer(width * STRETCH), wide = y.half ? buffer(plan.tokens * STRETCH) : nullptr;
    for (int64_t o = begin * STRETCH; o < std::min(end * STRETCH, columns); o += STRETCH) {
      const int64_t some = std::min(STRETCH, columns - o), stride = y.half ? STRETCH : y.stride;
      float* corner = y.half ? wide.get() : static_cast<float*>(y.data) + o;
      const void* start = onto.data != nullptr ? at(onto, 0, o) : ZEROS;
      for (int64_t unit = 0; unit < plan.units; ++unit) {
        const int64_t pair = plan.first(unit), count = plan.first(unit + 1) - pair;
        if (count == 0) continue;
        kernels().transpose[w.half](at(w, o, unit * width), w.stride, some, width, turned.get(), STRETCH);
        kernels().expand[onto.half](u + pair * width, width, plan.row + pair, plan.fresh + pair, count, turned.get(),
                                    STRETCH, width, some, start, onto.stride, corner, 0, stride);
      }
      if (y.half) put(corner, stride, plan.tokens, some, y, 0, o);
    }
  });
}

}  // namespace

void up(const float* u, const Factor& w, const Plan& plan, int64_t width, int64_t columns, const Matrix& onto,
        const Target& y) {
  if (width <= NARROW && plan.units > 1) return up_narrow(u, w, plan, width, columns, onto, y);
  const Cut cut(plan, 8);
  const int64_t tile = std::min(std::max<int64_t>(64, NEAR / cut.tokens / 64 * 64), tiles(columns, LINE) * LINE);
  const int64_t stretches = tiles(columns, tile), padded = tile + LINE;
  const int64_t tasks = cut.count * stretches;
  // Stretches outermost: tasks that follow each other need the same columns of the factor.
  parallel(tasks, plan.pairs() * width * columns / tasks, [&](int64_t begin, int64_t end) {
    const auto wide = y.half ? buffer(cut.tokens * padded) : nullptr;  // bfloat16 is summed in float32 beside y
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % cut.count, o = task / cut.count * tile, some = std::min(tile, columns - o);
      const int64_t token = part * cut.tokens, tokens = std::min(cut.tokens, plan.tokens - token);
      const int64_t stride = y.half ? padded : y.stride;
      float* corner = y.half ? wide.get() : static_cast<float*>(y.data) + token * y.stride + o;
      const void* start = onto.data != nullptr ? at(onto, 0, o) : ZEROS;
      for (int64_t unit = 0; unit < plan.units; ++unit) {
        const int64_t pair = cut.first(unit, part), count = cut.first(unit, part + 1) - pair;
        kernels().expand[onto.half](u + pair * width, width, plan.row + pair, plan.fresh + pair, count,
                                    w.data + unit * width * w.stride + o, w.stride, width, some, start, onto.stride,
                                    corner, token, stride);
      }
      if (y.half) put(corner, stride, tokens, some, y, token, o);
    }
  });
}

void up_across(const float* u, const Matrix& w, const Plan& plan, int64_t width, int64_t columns, const Matrix& onto,
               const Target& y, Workspace& memory) {
  if (plan.tokens <= FEW && width > NARROW) return up_few(u, w, plan, width, columns, onto, y);
  up(u, transposed(w, plan, width, columns, memory), plan, width, columns, onto, y);
}

void gather(const float* u, const Matrix& x, const Plan& plan, int64_t width, int64_t columns, const Target& out,
            bool across) {
  // A task owns some rows of the result, of one or several units, and a stretch of its columns. Long stretches are read
  // best; they are cut only as far as the threads need. No sum is cut, so that the cut does not show in the result.
  const int64_t together = std::clamp<int64_t>(RANKS / width, 1, plan.units), groups = tiles(plan.units, together);
  const int64_t slices = tiles(width, RANKS);
  int64_t wide = WIDE;
  while (wide > 64 && tiles(columns, wide) * groups * slices < 2 * threads()) wide /= 2;
  const int64_t tasks = tiles(columns, wide) * groups * slices, padded = wide + LINE;
  const bool direct = !across && !out.half;
  const Cut cut(plan, 24);
  // Stretches outermost: tasks that follow each other read the same columns of x, while they are in the cache.
  parallel(tasks, plan.pairs() * width * columns / tasks, [&](int64_t begin, int64_t end) {
    const auto sums = direct ? nullptr : buffer(RANKS * padded), turned = out.half ? buffer(RANKS * wide) : nullptr;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task / (groups * slices) * wide, some = std::min(wide, columns - o);
      const int64_t unit = task / slices % groups * together, units = std::min(together, plan.units - unit);
      const int64_t rank = task % slices * RANKS, ranks = std::min(RANKS, width - rank);
      const int64_t rows = units * ranks, to = unit * width + rank, stride = direct ? out.stride : padded;
      float* const corner = direct ? static_cast<float*>(out.data) + to * stride + o : sums.get();
      for (int64_t part = 0; part < cut.count; ++part)
        for (int64_t i = 0; i < units; ++i) {
          const int64_t pair = cut.first(unit + i, part), count = cut.first(unit + i, part + 1) - pair;
          kernels().outer[x.half](at(x, 0, o), x.stride, plan.row + pair, count, u + pair * width + rank, width, ranks,
                                  some, corner + i * ranks * stride, stride, part > 0);
        }
      if (direct) continue;
      if (!across) {
        put(corner, stride, rows, some, out, to, o);
      } else if (out.half) {
        kernels().transpose[0](corner, stride, rows, some, turned.get(), RANKS);
        put(turned.get(), RANKS, some, rows, out, o, to);
      } else {
        kernels().transpose[0](corner, stride, rows, some, static_cast<float*>(out.data) + o * out.stride + to,
                               out.stride);
      }
    }
  });
}

void widen_rows(const Matrix& from, int64_t rows, int64_t columns, float* to) {
  parallel(rows, columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) get(from, r, 0, columns, to + r * columns);
  });
}

void narrow_rows(const float* from, int64_t rows, int64_t columns, const Target& to) {
  parallel(rows, columns, [&](int64_t begin, int64_t end) {
    put(from + begin * columns, columns, end - begin, columns, to, begin, 0);
  });
}

}  // namespace moelora
