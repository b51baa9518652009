#include "plan.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace moelora {
namespace {

// Tokens per block. A block reads the factors of all its experts once, so it must hold enough tokens for each of them;
// it must also be small, so that its part of x or y stays in the second-level cache between experts.
int64_t block_size(int64_t k, int64_t units) {
  const int64_t wanted = 24 * units / std::max<int64_t>(k, 1);
  return std::clamp<int64_t>((wanted + 63) / 64 * 64, 64, 512);
}

}  // namespace

bool chosen(const int64_t* index, int64_t tokens, int64_t k, int64_t units, Workspace& memory, Plan& plan) {
  const int64_t pairs = tokens * k, block = block_size(k, units);
  const int64_t blocks = std::max<int64_t>(1, (tokens + block - 1) / block);
  auto* row = memory.take<int32_t>(pairs);
  auto* slot = memory.take<int32_t>(pairs);
  auto* fresh = memory.take<uint8_t>(pairs);
  auto* place = memory.take<int64_t>(pairs);
  auto* begin = memory.take<int64_t>(units * blocks + 1);
  auto* next = memory.take<int64_t>(units * blocks);
  std::fill(next, next + units * blocks, 0);

  // A counting sort: count, add up, deal out. A block of tokens has counters of its own, so blocks need no locks.
  std::atomic<bool> sound{true};
  parallel(blocks, block * k, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      for (int64_t i = b * block * k; i < std::min((b + 1) * block, tokens) * k; ++i) {
        const int64_t unit = index[i];
        if (unit < 0 || unit >= units) {
          sound = false;
          return;
        }
        ++next[unit * blocks + b];
      }
  });
  if (!sound) return false;
  int64_t total = 0;
  for (int64_t i = 0; i < units * blocks; ++i) {
    begin[i] = total;
    total += next[i];
    next[i] = begin[i];
  }
  begin[units * blocks] = total;
  parallel(blocks, block * k, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      for (int64_t t = b * block; t < std::min((b + 1) * block, tokens); ++t) {
        for (int64_t s = 0; s < k; ++s) {
          const int64_t pair = next[index[t * k + s] * blocks + b]++;
          row[pair] = static_cast<int32_t>(t);
          slot[pair] = static_cast<int32_t>(s);
          fresh[pair] = 0;
          place[t * k + s] = pair;
        }
        // Pairs are sorted by unit, so the lowest place is worked off first.
        if (k > 0) fresh[*std::min_element(place + t * k, place + (t + 1) * k)] = 1;
      }
  });
  plan = {tokens, units, block, blocks, row, slot, fresh, begin, place};
  return true;
}

Plan everyone(int64_t tokens, int64_t units, Workspace& memory) {
  const int64_t block = 64, blocks = std::max<int64_t>(1, (tokens + block - 1) / block);
  auto* row = memory.take<int32_t>(tokens * units);
  auto* slot = memory.take<int32_t>(tokens * units);
  auto* fresh = memory.take<uint8_t>(tokens * units);
  auto* place = memory.take<int64_t>(tokens * units);
  auto* begin = memory.take<int64_t>(units * blocks + 1);
  for (int64_t u = 0; u < units; ++u)
    for (int64_t b = 0; b < blocks; ++b) begin[u * blocks + b] = u * tokens + b * block;
  begin[units * blocks] = tokens * units;
  parallel(units * blocks, block, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      for (int64_t pair = begin[i]; pair < begin[i + 1]; ++pair) {
        const int64_t unit = i / blocks, token = pair - unit * tokens;
        row[pair] = static_cast<int32_t>(token);
        slot[pair] = static_cast<int32_t>(unit);
        fresh[pair] = unit == 0;
        place[token * units + unit] = pair;
      }
  });
  return {tokens, units, block, blocks, row, slot, fresh, begin, place};
}

}  // namespace moelora
