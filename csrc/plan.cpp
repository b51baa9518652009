#include "plan.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

namespace moelora {
namespace {

constexpr int64_t BLOCK = Plan::BLOCK;

int64_t blocks_of(int64_t tokens) { return (tokens + BLOCK - 1) / BLOCK; }

// Runs work(block, token) for all tokens, those of a block one after the other. A block has counters of its own, so
// blocks need no locks.
template <class F>
void each_token(int64_t tokens, int64_t k, const F& work) {
  parallel(blocks_of(tokens), BLOCK * k, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      for (int64_t t = b * BLOCK; t < std::min((b + 1) * BLOCK, tokens); ++t) work(b, t);
  });
}

}  // namespace

Plan chosen(const int64_t* index, int64_t tokens, int64_t k, int64_t units, Workspace& memory) {
  const int64_t blocks = blocks_of(tokens);
  auto* row = memory.take<int32_t>(tokens * k);
  auto* fresh = memory.take<uint8_t>(tokens * k);
  auto* place = memory.take<int64_t>(tokens * k);
  auto* begin = memory.take<int64_t>(units * blocks + 1);
  auto* next = memory.take<int64_t>(units * blocks);
  std::fill_n(next, units * blocks, 0);

  // A counting sort: count, add up, deal out.
  std::atomic<bool> outside{false}, twice{false};
  each_token(tokens, k, [&](int64_t b, int64_t t) {
    for (const int64_t* unit = index + t * k; unit < index + (t + 1) * k; ++unit)
      if (*unit < 0 || *unit >= units)
        outside = true;
      else
        ++next[*unit * blocks + b];
  });
  if (outside)
    throw std::runtime_error("moelora: index names a unit outside 0 to " + std::to_string(units - 1) + "; there are " +
                                std::to_string(units) + " units");
  int64_t total = 0;
  for (int64_t i = 0; i < units * blocks; ++i) {
    begin[i] = total;
    total += next[i];
    next[i] = begin[i];
  }
  begin[units * blocks] = total;
  each_token(tokens, k, [&](int64_t b, int64_t t) {
    for (int64_t i = t * k; i < (t + 1) * k; ++i) {
      const int64_t counter = index[i] * blocks + b, pair = next[counter]++;
      if (pair > begin[counter] && row[pair - 1] == t) twice = true;
      row[pair] = static_cast<int32_t>(t);
      fresh[pair] = 0;
      place[i] = pair;
    }
    // Pairs are sorted by unit, so the lowest place is worked off first.
    fresh[*std::min_element(place + t * k, place + (t + 1) * k)] = 1;
  });
  // Two pairs of one row of y could be in one tile of a product, which then loses one of them.
  if (twice) throw std::runtime_error("moelora: index names a unit twice for one token");
  return {tokens, units, blocks, row, fresh, begin, place, index};
}

Plan everyone(int64_t tokens, int64_t units, Workspace& memory) {
  const int64_t blocks = blocks_of(tokens);
  auto* row = memory.take<int32_t>(tokens * units);
  auto* fresh = memory.take<uint8_t>(tokens * units);
  auto* place = memory.take<int64_t>(tokens * units);
  auto* begin = memory.take<int64_t>(units * blocks + 1);
  for (int64_t i = 0; i < units * blocks; ++i) begin[i] = i / blocks * tokens + i % blocks * BLOCK;
  begin[units * blocks] = tokens * units;
  each_token(tokens, units, [&](int64_t, int64_t t) {
    for (int64_t u = 0; u < units; ++u) {
      const int64_t pair = u * tokens + t;
      row[pair] = static_cast<int32_t>(t);
      fresh[pair] = u == 0;
      place[t * units + u] = pair;
    }
  });
  return {tokens, units, blocks, row, fresh, begin, place, nullptr};
}

}  // namespace moelora
