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

// --- clusters

namespace {

std::vector<twin::Finding> run_cluster(const std::function<void()>& body, uint64_t seed, unsigned blocks = 3) {
  return twin::launch({2, 2 * blocks}, kThreads, 4096, body, seed, {1, blocks});
}

// Each thread writes its words and reads those of the next block. The line of the read is returned.
int next_block(bool before, bool after) {
  const auto words = as<uint32_t>(arena(), 0);
  st16(words, 4 * tid(), Vec16{{tid(), cluster_rank(), bid_x(), bid_y()}});
  if (before) cluster_sync();
  const unsigned next = (cluster_rank() + 1) % cluster_blocks();
  const Vec16 got = ld16_of(next, words, 4 * ((tid() + 5) % kThreads));
  const int line = __LINE__ - 1;
  if (after) cluster_sync();
  if (before && (got.word[0] != (tid() + 5) % kThreads || got.word[1] != next || got.word[2] != bid_x() ||
                 got.word[3] != bid_y() - cluster_rank() + next)) {
    twin::report("wrong", "words of another block", {__FILE__, line});
  }
  return line;
}

}  // namespace

TAPS_CASE(blocks_of_a_cluster_read_each_other) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    for (const unsigned blocks : {1, 2, 3, 8}) {
      if (const auto found = run_cluster([] { next_block(true, true); }, seed, blocks); !found.empty())
        return none(found);
    }
  }
  return "";
}

TAPS_CASE(what_a_block_has_not_published) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    int line = 0;
    // Some threads read before the others wrote: then the write races, and the read finds nothing written.
    const auto found = run_cluster([&] { line = next_block(false, true); }, seed);
    bool race = false;
    for (const auto& finding : found) race = race || finding.kind == "race";
    if (!race) return "expected a race, got" + host::shown(found);
    if (seed == 0) {
      if (const auto problem = some(found, "uninitialised", line); !problem.empty()) return problem;
    }
  }
  return "";
}

TAPS_CASE(a_block_s_own_barrier_publishes_to_no_other) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    const auto found = run_cluster(
        [&] {
          const auto words = as<uint32_t>(arena(), 0);
          if (cluster_rank() == 0) st16(words, 4 * tid(), Vec16{});
          cluster_sync();
          if (cluster_rank() == 0) st16(words, 4 * tid(), Vec16{});
          block_sync();
          ld16_of(0, words, 4 * (tid() ^ 1));
          cluster_sync();
        },
        seed);
    bool race = false;
    for (const auto& finding : found) race = race || finding.kind == "race";
    if (!race) return "seed " + std::to_string(seed) + ": expected a race, got" + host::shown(found);
  }
  return "";
}

TAPS_CASE(a_block_that_may_have_ended) {
  for (uint64_t seed = 0; seed < 8; ++seed) {  // whether or not it has
    int line = 0;
    const auto found = run_cluster([&] { line = next_block(true, false); }, seed);
    if (const auto problem = only(found, "ended", line); !problem.empty()) return problem;
  }
  return "";
}

TAPS_CASE(a_cluster_s_barrier_that_a_block_leaves_out) {
  for (uint64_t seed = 0; seed < 2; ++seed) {
    int line = 0;
    const auto found = run_cluster(
        [&] {
          if (cluster_rank() != 1) cluster_sync();
          line = __LINE__ - 1;
        },
        seed);
    if (const auto problem = only(found, "deadlock", line); !problem.empty()) return problem;
  }
  return "";
}

TAPS_CASE(a_block_that_a_cluster_has_not) {
  int line = 0;
  const auto found = run_cluster(
      [&] {
        const auto words = as<uint32_t>(arena(), 0);
        st16(words, 4 * tid(), Vec16{});
        cluster_sync();
        ld16_of(cluster_blocks(), words, 4 * tid());
        line = __LINE__ - 1;
        cluster_sync();
      },
      1);
  if (const auto problem = only(found, "out of range", line); !problem.empty()) return problem;
  for (const twin::Dim cluster : {twin::Dim{1, 4}, twin::Dim{1, 13}, twin::Dim{0, 1}}) {
    const auto refused = twin::launch({2, 13}, 32, 64, [] {}, 0, cluster);
    if (refused.size() != 1 || refused[0].kind != "launch") return "expected a refusal, got" + host::shown(refused);
  }
  return "";
}

int main() { return host::run_all(); }
