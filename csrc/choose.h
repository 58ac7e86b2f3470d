// Which path a gated layer takes. Every threshold, with the measurement behind it, lives here.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

namespace taps {

enum class Path { kStock, kRebuild };

inline const char* name_of(Path path) { return path == Path::kStock ? "stock" : "rebuild"; }

// What the choice may depend on.
struct Problem {
  bool cuda = false;
  bool open = false;       // as far as the host knows; an unknown gate counts as open
  bool same_dtype = true;  // the weight already has the compute type
  long long rows = 0;      // M: rows of the product
  long long outputs = 0;   // N
  long long inputs = 0;    // K
};

// kStock: the layer's own weight through torch's op; a closed gate costs the base layer.
// kRebuild: W_t (or the cast weight) into the workspace, then torch's op. No threshold yet: on the
// CPU a rebuild costs 1-10 % over the merged op, and nothing else has been measured faster so far.
constexpr Path choose(const Problem& problem) {
  return !problem.open && problem.same_dtype ? Path::kStock : Path::kRebuild;
}

// --- for tests -----------------------------------------------------------------------------------

inline std::atomic<int>& forced_path() {
  static std::atomic<int> path{-1};
  return path;
}

inline void force_path(const std::string& name) {
  if (name.empty()) {
    forced_path() = -1;
  } else if (name == "stock") {
    forced_path() = static_cast<int>(Path::kStock);
  } else if (name == "rebuild") {
    forced_path() = static_cast<int>(Path::kRebuild);
  } else {
    throw std::runtime_error("path: expected stock, rebuild or None, got " + name);
  }
}

// A forced path that cannot give the right answer is refused, not taken.
inline Path chosen_path(const Problem& problem) {
  const int forced = forced_path().load(std::memory_order_relaxed);
  if (forced < 0) return choose(problem);
  if (forced == static_cast<int>(Path::kStock) && choose(problem) != Path::kStock) {
    throw std::runtime_error("path: stock is forced, but the gate is open or the weight needs a cast");
  }
  return static_cast<Path>(forced);
}

}  // namespace taps
