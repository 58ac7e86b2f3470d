// The twin's own tests: every mistake that it is there to find, planted once, with the line it must name; and the
// same code done right, under several schedules, without a finding.
#include "check.h"
#include "cuda/primitives.cuh"

using namespace taps::dev;  // NOLINT
using host::none;
using host::only;
using host::some;

namespace {

constexpr unsigned kThreads = 64;

std::vector<twin::Finding> run(const std::function<void()>& body, uint64_t seed = 0, unsigned threads = kThreads,
                               std::size_t bytes = 4096) {
  return twin::launch({1, 1, 1}, threads, bytes, body, seed);
}

// Each thread writes its word and reads its neighbour's. The line of what the barrier leaves out is returned.
int neighbours(bool synchronised) {
  const auto words = as<uint32_t>(arena(), 0);
  st(words, tid(), tid());
  if (synchronised) block_sync();
  ld(words, (tid() + 1) % nthreads());
  return __LINE__ - 1;
}

}  // namespace

TAPS_CASE(a_barrier_orders) {
  for (uint64_t seed : {0, 1, 2, 3}) {
    if (const auto found = run([] { neighbours(true); }, seed); !found.empty()) return none(found);
  }
  return "";
}

TAPS_CASE(a_missing_barrier_is_a_race_in_every_order) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    int line = 0;
    // Some threads read before their neighbour wrote: then the write races, and the read finds nothing written.
    const auto found = run([&] { line = neighbours(false); }, seed);
    bool race = false;
    for (const auto& finding : found) race = race || finding.kind == "race";
    if (!race) return "seed " + std::to_string(seed) + ": expected a race, got" + host::shown(found);
  }
  return "";
}

TAPS_CASE(reads_before_a_later_write_need_a_barrier) {
  int line = 0;
  const auto found = run([&] {
    const auto words = as<uint32_t>(arena(), 0);
    st(words, tid(), tid());
    block_sync();
    ld(words, (tid() + 1) % nthreads());
    st(words, tid(), 0u);
    line = __LINE__ - 1;
  });
  return some(found, "race", line);
}

TAPS_CASE(many_readers_are_all_remembered) {
  int line = 0;
  const auto found = run([&] {
    const auto words = as<uint32_t>(arena(), 0);
    if (tid() == 0) st(words, 0, 7u);
    block_sync();
    ld(words, 0);
    if (tid() >= 32) bar_sync(1, 32);  // orders the upper half alone
    if (tid() == 63) st(words, 0, 8u);
    line = __LINE__ - 1;
  });
  return only(found, "race", line);
}

TAPS_CASE(warp_sync_orders_one_warp_alone) {
  const auto inside = run([] {
    const auto words = as<uint32_t>(arena(), 0);
    st(words, tid(), tid());
    warp_sync();
    ld(words, tid() ^ 1);
  });
  if (!inside.empty()) return none(inside);
  int line = 0;
  const auto across = run([&] {
    const auto words = as<uint32_t>(arena(), 0);
    st(words, tid(), tid());
    warp_sync();
    if (tid() >= 32) ld(words, tid() ^ 32);
    line = __LINE__ - 1;
  });
  return only(across, "race", line);
}

TAPS_CASE(shuffles_order_nothing) {
  int line = 0;
  const auto found = run(
      [&] {
        const auto words = as<uint32_t>(arena(), 0);
        st(words, tid(), tid());
        shfl(tid(), 0);
        ld(words, tid() ^ 1);
        line = __LINE__ - 1;
      },
      0, 32);
  return only(found, "race", line);
}

TAPS_CASE(an_arrival_gives_and_does_not_take) {
  // Producer and consumer warps with a barrier each way: right.
  const auto right = run([] {
    const auto words = as<uint32_t>(arena(), 0);
    if (warp() == 0) {
      st(words, lane(), lane());
      bar_arrive(1, 64);
    } else {
      bar_sync(1, 64);
      ld(words, lane());
    }
  });
  if (!right.empty()) return none(right);
  int line = 0;
  const auto wrong = run([&] {  // what comes after the arrival is not covered by it
    const auto words = as<uint32_t>(arena(), 0);
    if (warp() == 0) {
      bar_arrive(1, 64);
      st(words, lane(), lane());
    } else {
      bar_sync(1, 64);
      ld(words, lane());
      line = __LINE__ - 1;
    }
  });
  return only(wrong, "race", line);
}

TAPS_CASE(nothing_written_is_found) {
  int line = 0;
  const auto found = run([&] {
    ld(as<float>(arena(), 0), tid());
    line = __LINE__ - 1;
  });
  return only(found, "uninitialised", line);
}

TAPS_CASE(out_of_range_and_misaligned) {
  int line = 0;
  const auto range = run([&] {
    if (tid() == 0) st(as<float>(arena(), 0), 1024, 1.0f);
    line = __LINE__ - 1;
  });
  if (const auto problem = only(range, "out of range", line); !problem.empty()) return problem;
  const auto alignment = run([&] {
    if (tid() == 0) st16(as<uint16_t>(arena(), 0), 3, Vec16{});
    line = __LINE__ - 1;
  });
  return only(alignment, "misaligned", line);
}

TAPS_CASE(divergent_barriers_do_not_hang) {
  int line = 0;
  const auto found = run([&] {
    if (tid() != 5) block_sync();
    line = __LINE__ - 1;
  });
  return only(found, "deadlock", line);
}

TAPS_CASE(a_lane_that_stays_away) {
  int line = 0;
  const auto found = run([&] {
    if (lane() != 9) ballot(true);
    line = __LINE__ - 1;
  });
  return only(found, "deadlock", line);
}

TAPS_CASE(lanes_in_different_collectives) {
  int line = 0;
  const auto found = run(
      [&] {
        if (lane() < 31) {
          shfl(1, 0);
        } else {
          shfl_xor(1, 1);
          line = __LINE__ - 1;
        }
      },
      0, 32);
  return only(found, "divergence", line);
}

TAPS_CASE(barriers_that_disagree) {
  int line = 0;
  const auto found = run([&] {
    if (warp() == 0) {
      bar_sync(2, 64);
    } else {
      bar_sync(2, 32);
      line = __LINE__ - 1;
    }
  });
  return only(found, "barrier", line);
}

// --- asynchronous copies

namespace {

alignas(16) const float kSource[256] = {1, 2, 3, 4, 5, 6, 7, 8};

}  // namespace

TAPS_CASE(a_copy_is_there_after_wait_and_barrier) {
  std::string problem;
  const auto found = run([&] {
    const auto floats = as<float>(arena(), 0);
    cp_async<16>(floats, 4 * tid(), kSource + 4 * (tid() % 2), tid() == 1 ? 8 : 16);
    cp_commit();
    cp_wait<0>();
    block_sync();
    if (tid() == 40 && (ld(floats, 0) != 1 || ld(floats, 5) != 6 || ld(floats, 6) != 0)) problem = "wrong values";
  });
  return found.empty() ? problem : none(found);
}

TAPS_CASE(a_copy_that_was_not_waited_for) {
  int line = 0;
  const auto found = run([&] {
    const auto floats = as<float>(arena(), 0);
    cp_async<16>(floats, 4 * tid(), kSource, 16);
    cp_commit();
    block_sync();
    ld(floats, 4 * tid());
    line = __LINE__ - 1;
    cp_wait<0>();
  });
  return only(found, "pending copy", line);
}

TAPS_CASE(a_wait_for_too_few_groups) {
  int line = 0;
  const auto found = run([&] {
    const auto floats = as<float>(arena(), 0);
    for (unsigned stage = 0; stage < 3; ++stage) {
      cp_async<16>(floats, 256 * stage + 4 * tid(), kSource, 16);
      cp_commit();
    }
    cp_wait<2>();  // the first group alone has landed
    block_sync();
    ld(floats, 4 * tid());
    ld(floats, 256 + 4 * tid());
    line = __LINE__ - 1;
    cp_wait<0>();
  });
  return only(found, "pending copy", line);
}

TAPS_CASE(empty_groups_count) {
  const auto found = run([] {
    const auto floats = as<float>(arena(), 0);
    cp_async<16>(floats, 4 * tid(), kSource, 16);
    cp_commit();
    cp_commit();
    cp_commit();
    cp_wait<2>();
    ld(floats, 4 * tid());
  });
  return none(found);
}

TAPS_CASE(a_barrier_before_the_wait_covers_only_ones_own_copies) {
  int line = 0;
  const auto found = run([&] {
    const auto floats = as<float>(arena(), 0);
    cp_async<16>(floats, 4 * tid(), kSource, 16);
    cp_commit();
    block_sync();
    cp_wait<0>();
    ld(floats, 4 * tid());
    if (tid() > 0) ld(floats, 4 * (tid() - 1));
    line = __LINE__ - 1;
  });
  return some(found, "race", line);
}

TAPS_CASE(a_buffer_that_is_reused_too_early) {
  int line = 0;
  const auto found = run([&] {
    const auto floats = as<float>(arena(), 0);
    st(floats, tid(), 1.0f);
    block_sync();
    ld(floats, (tid() + 8) % 64);
    if (tid() < 16) cp_async<16>(floats, 4 * tid(), kSource, 16);
    line = __LINE__ - 1;
    cp_commit();
    cp_wait<0>();
  });
  return some(found, "race", line);
}

TAPS_CASE(exit_with_a_copy_in_flight) {
  int line = 0;
  const auto found = run([&] {
    cp_async<16>(as<float>(arena(), 0), 4 * tid(), kSource, 16);
    line = __LINE__ - 1;
    cp_commit();
  });
  return only(found, "pending copy", line);
}

TAPS_CASE(a_misaligned_source) {
  int line = 0;
  const auto found = run([&] {
    cp_async<16>(as<float>(arena(), 0), 4 * tid(), kSource + 1, 16);
    line = __LINE__ - 1;
    cp_commit();
    cp_wait<0>();
  });
  return only(found, "misaligned", line);
}

TAPS_CASE(blocks_start_afresh) {
  const auto found = twin::launch({3, 2, 1}, 32, 256, [] {
    st(as<uint32_t>(arena(), 0), lane(), bid_x() + 10 * bid_y());
    warp_sync();
    ld(as<uint32_t>(arena(), 0), lane() ^ 1);
  });
  return none(found);
}

int main() { return host::run_all(); }
